"""Whether an answer hangs a verifier or ends its process: asked in a process of its own, which can be killed.

`eval` of 9**9**9 holds Python's lock for ever, and no signal or thread of the same process gets through to it.
"""

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from types import TracebackType
from typing import IO, Any, Self

from pascaline.data.puzzles import Problem
from pascaline.errors import BadInput

START = 120.0  # seconds for the imports, and whatever a verifier does at its first call


class Probe:
    """`with Probe(problem, answer) as probe: probe.survives(problem, text, seconds)`. The first answer warms it up."""

    def __init__(self, problem: Problem, answer: str) -> None:
        self.first = problem, answer
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._kill()

    def survives(self, problem: Problem, text: str, seconds: float) -> str:
        """ "" if the verifier came back, whatever it said; else what happened."""
        if self._process is None:
            trouble = self._ask(*self.first, START)
            if trouble:
                raise BadInput(
                    f"verifier or puzzle '{problem.verifier or problem.puzzle}' in a process of its own {trouble}, on an honest answer."
                )
        return self._ask(problem, text, seconds)

    def _ask(self, problem: Problem, text: str, seconds: float) -> str:
        self._process = self._process or _start()
        sent, heard = self._process.stdin, self._process.stdout
        assert sent is not None and heard is not None
        try:
            sent.write(json.dumps([asdict(problem), text]).encode() + b"\n")
            sent.flush()
        except BrokenPipeError:
            self._kill()
            return "ended its process"
        if not select.select([heard], [], [], seconds)[0]:
            self._kill()
            return f"did not come back within {seconds:g} s"
        if not heard.readline():
            self._kill()
            return "ended its process"
        return ""

    def _kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
        self._process = None


def _start() -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-c", "from pascaline.eval.hygiene.probe import listen; listen()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
                            start_new_session=True)  # fmt: skip


def listen() -> None:
    """The other process: a line in, [problem, text], a line out. What a verifier prints goes elsewhere."""
    out: IO[Any] = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from pascaline.eval.hygiene.subject import ask, said

    for line in sys.stdin:
        problem, text = json.loads(line)
        ask([Problem(**problem)], [said(text)])
        print("back", file=out, flush=True)
