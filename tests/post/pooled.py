"""What the tests let the pool call; it imports nothing heavy, as each process loads it."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

kept: list[bytearray] = []


def act(what: str, x: Any = None) -> Any:
    """Behaves as it is told."""
    if what == "noise":
        print("noise", flush=True)
        os.write(1, b'["done", "noise", false]\n')
    elif what == "power":
        return 9**9**9**9 > 0  # holds the interpreter's lock
    elif what == "sleep":
        time.sleep(x)
    elif what == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(3)
    elif what == "leave":
        raise SystemExit(3)
    elif what == "raise":
        raise ValueError(f"no {x}")
    elif what == "memory":
        bytearray(x)
    elif what == "keep":
        kept.append(bytearray(x))
        return len(kept)
    elif what == "input":
        return input()
    elif what == "object":
        return object()
    elif what == "child":
        return subprocess.Popen(["sleep", "1000"]).pid
    elif what == "pid":
        return os.getpid()
    elif what == "modules":
        return sorted({"torch", "numpy", "pascaline"} & set(sys.modules))
    return x


def late(x: int, hangs: int) -> tuple[int, float]:
    """When it was done; the clock is one for all processes. The call of that number never is."""
    time.sleep(1000 if x == hangs else 0)
    return x, time.monotonic()
