"""Runs a Python program that nobody has read, away from the rest, with bounds on all it may use.

What shuts it in depends on what this machine permits; `protections()` tells. It is no security boundary: the kernel is shared.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pascaline.errors import BadInput
from pascaline.post.verifiers.launcher import NOBODY, PATIENCE

Ended = Literal["exit", "signal", "cpu", "wall", "output", "starved", "sandbox"]
T = TypeVar("T")
R = TypeVar("R")

LAUNCHER = Path(__file__).with_name("launcher.py")
GRACE = 30.0  # seconds for the launcher itself on a loaded machine, before and after the program
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")


@dataclass(frozen=True)
class Limits:
    """What a program may use. Seconds and bytes; CPU and memory are of each process, the CPU also of all together at the wall clock's end.

    wall counts from the program's start and leaves out the time in which others had the processor.
    """

    cpu: int = 5
    wall: float = 10.0
    memory: int = 512 << 20  # address space
    file_size: int = 16 << 20
    open_files: int = 64
    processes: int = 16  # threads count
    output: int = 1 << 20  # of standard output, and of standard error

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            right = isinstance(value, int | float if field.name == "wall" else int) and not isinstance(value, bool) and value > 0
            if not right:
                raise BadInput(
                    f"limits: {field.name} = {value!r} is wrong; it must be a positive number{'' if field.name == 'wall' else ', whole'}."
                )
        if self.memory < 32 << 20:
            raise BadInput(f"limits: memory = {self.memory} bytes is less than Python itself needs; give at least {32 << 20}.")


@dataclass(frozen=True)
class Ran:
    """What became of a program.

    ended: exit (status is its code) or signal (status is -signal), by itself; cpu, wall, output: it was stopped at that limit; starved:
    others had the processor for so long that nothing can be said of it; sandbox: it could not be run (stderr says why).
    seconds: from its start to its end, without those in which it waited for a processor.
    """

    status: int | None
    stdout: str
    stderr: str
    ended: Ended
    seconds: float


def run(source: str, stdin: str = "", limits: Limits | None = None) -> Ran:
    """Run a program with this standard input. Python's standard library only, an empty folder, no network where the machine permits."""
    return _run(source, stdin, limits or Limits(), _mode())[0]


def run_many(one: Callable[[T], R], many: Iterable[T]) -> list[R]:
    """one(x) for each x, in order; as many at once as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as threads:
        return list(threads.map(one, many))


def protections() -> dict[str, bool]:
    """What shuts programs in on this machine.

    files: they see the interpreter and an empty folder, nothing else; network: none; processes: they see and signal only their own, and
    all die with them; count: their number is bounded for each program alone; user: they run as nobody. The limits always hold.
    """
    return _run("", "", Limits(wall=60), _mode())[1].get("protections", {})


@lru_cache(maxsize=1)
def _mode() -> str:
    """The strongest way to shut a program in that works here: namespaces; as root, another user; else limits alone."""
    why = ""
    for mode in ("spaces", "nobody", "bare") if os.geteuid() == 0 else ("spaces", "bare"):
        ran, _ = _run("print(6 * 7)", "", Limits(wall=60), mode)
        if ran.stdout == "42\n":
            return mode
        why = ran.stderr.strip()
    raise BadInput(f"the sandbox cannot run Python on this machine: {why}.")


def _run(source: str, stdin: str, limits: Limits, mode: str) -> tuple[Ran, dict[str, Any]]:
    python = os.path.realpath(sys.executable)
    with tempfile.TemporaryDirectory(prefix="pascaline-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_bytes(source.encode(errors="replace"))
        if mode == "nobody":
            os.chown(folder, NOBODY, NOBODY)
        visible = [*SYSTEM, sys.base_prefix, sys.base_exec_prefix, python]
        order = {"mode": mode, "python": python, "visible": visible, "folder": folder, "limits": asdict(limits)}
        status, theirs = os.pipe()
        try:
            process = subprocess.Popen(
                [python, "-I", "-S", "-B", str(LAUNCHER), json.dumps(order), str(theirs)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                cwd=folder, env={}, pass_fds=[theirs], start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(theirs)
        with process, os.fdopen(status, "rb", buffering=0) as told:
            try:
                said, stopped = _talk(process, told.fileno(), stdin.encode(errors="replace"), limits)
            except BaseException:  # Ctrl-C: the launcher has a session of its own and would not notice
                process.kill()
                raise
    report: dict[str, Any] = {}
    for line in bytes(said["status"]).splitlines():
        report |= json.loads(line)
    stdout, stderr = (bytes(said[name][: limits.output]).decode(errors="replace") for name in ("stdout", "stderr"))
    ended: Ended = stopped or report.get("ended", "sandbox")
    if "error" in report:
        ended, stderr = "sandbox", report["error"]
    return Ran(report.get("status"), stdout, stderr, ended, report.get("seconds", 0.0)), report


def _talk(process: subprocess.Popen[bytes], status: int, stdin: bytes, limits: Limits) -> tuple[dict[str, bytearray], Ended | None]:
    """Feed the program and listen to it until the launcher has ended; ("output" or "starved" if it was ended from here)."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise ValueError("the launcher needs three pipes")
    said = {"stdout": bytearray(), "stderr": bytearray(), "status": bytearray()}
    rest = memoryview(stdin)
    until = time.monotonic() + PATIENCE * limits.wall + GRACE
    stopped: Ended | None = None
    with selectors.DefaultSelector() as pipes:
        for file, name in (process.stdout.fileno(), "stdout"), (process.stderr.fileno(), "stderr"), (status, "status"):
            os.set_blocking(file, False)
            pipes.register(file, selectors.EVENT_READ, name)
        os.set_blocking(process.stdin.fileno(), False)
        pipes.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        while "status" in {key.data for key in pipes.get_map().values()} and not stopped:
            for key, _ in pipes.select(max(0.0, until - time.monotonic())):
                if key.data == "stdin":
                    rest = _feed(process.stdin, rest)
                    if not rest:
                        pipes.unregister(process.stdin)
                        process.stdin.close()
                elif (piece := _read(key.fd)) == b"":
                    pipes.unregister(key.fd)
                else:
                    said[key.data] += piece or b""
            if max(len(said["stdout"]), len(said["stderr"])) > limits.output:
                stopped = "output"
            elif time.monotonic() >= until:
                stopped = "starved"
        if stopped:
            _stop(process)
        for key in list(pipes.get_map().values()):
            while key.data in said and not stopped and len(said[key.data]) <= limits.output and (piece := _read(key.fd)):
                said[key.data] += piece
    if max(len(said["stdout"]), len(said["stderr"])) > limits.output:
        stopped = "output"
    return said, stopped


def _feed(pipe: Any, rest: memoryview) -> memoryview:
    """What is still to be written; nothing once nobody reads."""
    try:
        return rest[os.write(pipe.fileno(), rest[:65536]) :] if rest else rest
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        return rest[:0]


def _read(file: int) -> bytes | None:
    """What is there: b"" at the end, None if nothing is there now."""
    try:
        return os.read(file, 65536)
    except BlockingIOError:
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # the launcher passes it on to the keeper, which kills the program and all its kin
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
