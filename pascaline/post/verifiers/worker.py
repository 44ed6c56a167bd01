"""A process of the pool (pool.py): it does one call after the other, and can be killed at any moment.

Started as a file, not as a module, so that it imports nothing but what the calls need. It reads JSON lines from its standard input:
a string "module:function" loads that function, a list calls it with these arguments. Each is answered by one line
[kind, value, last]: "done" and the result, "error" and what was raised, "crash" and why. `last` says that this process should be
replaced: calls have left so much in its caches that half of the memory free at first is gone, and the next call shall not starve.
"""

import contextlib
import fcntl
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

LONGEST = 500  # characters of an exception's text that are passed on


def serve(memory: int, lifeline: int) -> None:
    """memory: bytes that this process may map; lifeline: the end of a pipe whose other end dies with the pool."""
    bound(memory, lifeline)
    # What the called functions print or read must not touch the pipes: these get numbers of their own.
    questions, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    function: Callable[..., Any] = print
    most = memory  # bytes mapped at which it is time to go
    with contextlib.suppress(BrokenPipeError):  # the pool is gone
        for line in questions:
            asked = json.loads(line)
            try:
                if isinstance(asked, str):
                    function, result = load(asked), None
                    most = (mapped() + memory) // 2
                else:
                    result = function(*asked)
                answer = json.dumps(["done", result, mapped() > most])
            except MemoryError:  # who knows what is left undone
                answer = json.dumps(["crash", f"it took more than {memory >> 20} MiB of memory", True])
            except BaseException as error:  # of whatever was called; SystemExit too
                answer = json.dumps(["error", f"{type(error).__name__}: {error}"[:LONGEST], mapped() > most])
            write(answers, answer.encode() + b"\n")
    os.killpg(os.getpid(), signal.SIGKILL)  # with whatever was started here


def bound(memory: int, lifeline: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already, or the system knows none
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The kernel sends SIGIO to this process group when the pool's end is closed, however the pool ended. A thread that waits for it
    # would not do: a power of huge numbers holds the interpreter's lock for hours. SIGIO kills whoever does not handle it.
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def load(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not callable(found):
        raise TypeError(f"{attribute} is no function, but {type(found).__name__}")
    return found


def mapped() -> int:
    """Bytes of address space, which is what the limit counts; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb", 0) as file:
            return int(file.read(64).split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
