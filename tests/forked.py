"""The command line in a process of its own, without the seconds that importing torch takes: forked from a server that has done it."""

import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pascaline.post.evaluation", "pascaline.cli", "matplotlib.figure", "torch._dynamo"])


@dataclass
class Running:
    process: BaseProcess
    files: tuple[Path, Path]

    def wait(self, seconds: float = 120) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)"""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.files[1].read_text()}")
        out, err = (path.read_text() if path.is_file() else "" for path in self.files)
        return self.process.exitcode, out, err


def start(folder: Path, *arguments: object, stdin: str = os.devnull, terminal: str | None = None) -> Running:
    """`pascaline ARGUMENTS` in a new process. folder: where its output is kept; terminal: a device that is all three streams."""
    number = len(list(folder.glob("*.out")))
    files = folder / f"{number}.out", folder / f"{number}.err"
    places = [terminal] * 3 if terminal else [stdin, *map(str, files)]
    files[0].touch()
    process = _context.Process(target=_body, args=([str(a) for a in arguments], places))
    process.start()
    return Running(process, files)


def call(folder: Path, *arguments: object, stdin: str = os.devnull) -> tuple[int, str, str]:
    return start(folder, *arguments, stdin=stdin).wait()


def _body(arguments: list[str], places: list[str]) -> None:
    for fd, place in enumerate(places):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o666), fd)
    # New objects: the old ones remember what the server's files could do.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
    sys.argv = ["pascaline", *arguments]
    from pascaline.cli import main

    main()
