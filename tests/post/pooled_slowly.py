"""Loading takes a second, as that of math-verify does on a busy machine."""

import os
import sys
import time

time.sleep(1)


def slow_to_load(hang: bool) -> tuple[bool, float]:
    time.sleep(1000 if hang else 0)
    return hang, time.monotonic()


def __getattr__(name: str) -> object:
    if name == "dies":
        os._exit(4)
    if name == "__path__":
        raise AttributeError(name)
    return getattr(sys, name)
