"""Stopping a long job on request: signals become a flag that loops poll."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(Exception):
    """The user asked to stop; everything up to a step is saved, unless it is said not to be resumable. polite: by SIGTERM, as a scheduler
    does, and not by Ctrl-C."""

    def __init__(self, message: str, polite: bool = False):
        super().__init__(message)
        self.polite = polite
        self.resumable = True


class Interrupt:
    """`with Interrupt() as stop:` SIGINT and SIGTERM set `stop.requested`, which loops poll at step borders.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread nothing is installed; a signal that the parent
    told us to ignore (nohup) stays ignored. Nested uses all see the request.
    """

    def __init__(self) -> None:
        self.requested = False
        self.polite = False
        self._since = 0.0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def request(self, polite: bool = False) -> None:
        """Ask the loop, and those around it, to stop at the next border."""
        if not self.requested:
            self.requested, self.polite, self._since = True, polite, time.monotonic()
        for handler in self._before.values():
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Interrupt):
                outer.request(polite)

    def stopped(self, message: str) -> Stopped:
        """What a loop raises that has found the request."""
        return Stopped(message, self.polite)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked worker polls nothing; let the signal end it as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # `timeout` signals the process and then its group, so the same wish may come twice within a moment.
        if self.requested and number == signal.SIGINT and time.monotonic() - self._since > 0.1:
            raise KeyboardInterrupt
        if Screen.live:
            Screen.wish = WISH
        elif not self.requested and os.isatty(2):
            os.write(2, f"\n{WISH}\n".encode())  # print is not safe in a handler
        self.request(polite=number == signal.SIGTERM)


WISH = "stopping at the next step; Ctrl-C again stops at once"


class Screen:
    """Who says the wish: a live display, which would be torn by words between its lines, or the signal's handler."""

    live = False
    wish = ""
