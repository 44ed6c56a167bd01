"""TensorBoard, wandb and trackio beside metrics.jsonl: each gets the rows' scalars in a process of its own.

So a sink cannot stop, slow or change a run: whatever it prints, asks, hooks into or waits for happens elsewhere, and the trainer only
writes lines into a pipe that it never waits for. `python -m pascaline.train.sinks NAME OUT STAGE` is that process.
"""

import contextlib
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from pascaline.runs import read_json, write_atomic

ROOM = 16_000_000  # bytes that may wait for a sink before it is given up
PATIENCE = 3.0  # seconds at the end of a stage for all sinks together; who needs longer goes on by itself
END = b"end\n"  # the stage ended well: without it the other side knows that the run was stopped or killed


class Sinks:
    """`with sinks.open(say): sinks.log(row)`. names: of TOOLS. `say` gets a line about a sink that failed; the others go on."""

    def __init__(self, names: Sequence[str] = (), out: Path = Path(), stage: str = "") -> None:
        self.names, self.out, self.stage = list(dict.fromkeys(names)), out, stage
        self._pipes: list[Pipe] = []
        self._say: Callable[[str], None] = print

    def open(self, say: Callable[[str], None]) -> Self:
        self._say = say
        return self

    def __enter__(self) -> Self:
        for name in self.names:
            with self._watched(name):
                identity(self.out)
                self._pipes.append(Pipe(name, self.out, self.stage))
        return self

    def log(self, row: Mapping[str, Any]) -> None:
        """The scalars of a row of metrics.jsonl; returns at once."""
        if self._pipes:
            line = json.dumps({"step": row["step"], **scalars(row)}).encode() + b"\n"
            for pipe in list(self._pipes):
                with self._watched(pipe.name):
                    pipe.send(line)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        deadline = time.monotonic() + PATIENCE
        for pipe in list(self._pipes):
            with self._watched(pipe.name):
                pipe.close(END if kind is None else b"", deadline)
        self._pipes = []

    @contextlib.contextmanager
    def _watched(self, name: str) -> Any:
        try:
            yield
        except OSError as e:
            self._pipes = [pipe for pipe in self._pipes if pipe.name != name]
            why = _last_line(log_file(self.out, name, self.stage)) or str(e)
            self._say(f"{name} failed, going on without it ({why}); metrics.jsonl has every row")


class Pipe:
    """The process of one sink, and what it has not taken yet. OSError when it is gone, or too far behind."""

    def __init__(self, name: str, out: Path, stage: str) -> None:
        self.name, self._waiting = name, bytearray()
        # Not the current folder's modules (wandb leaves a folder `wandb` in it), but those that this program can import.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-m", "pascaline.train.sinks", name, str(out), stage]
        with open(log_file(out, name, stage), "wb") as log:  # a session of its own: Ctrl-C is for the trainer
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True, bufsize=0
            )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)

    def send(self, line: bytes) -> None:
        self._waiting += line
        with contextlib.suppress(BlockingIOError):
            while self._waiting:
                del self._waiting[: os.write(self._stdin.fileno(), self._waiting[:65536])]
        if len(self._waiting) > ROOM:
            self._process.kill()
            raise TimeoutError("it does not keep up")

    def close(self, last: bytes, deadline: float) -> None:
        """Hand over the rest, wait for the process up to the deadline, and leave it to itself then."""
        self._waiting += last
        while True:
            self.send(b"")
            if not self._waiting or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(max(deadline - time.monotonic(), 0)):
                raise BrokenPipeError("it ended with an error")


def log_file(out: Path, name: str, stage: str) -> Path:
    """What the tool printed."""
    return out / "sinks" / f"{name}-{stage}.log"


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, but the step; true is 1. Lists and words stay in metrics.jsonl."""
    return {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float) and math.isfinite(v)}


def identity(out: Path) -> str:
    """Eight letters that this run has as long as it lives; made at first use."""
    path = out / "sinks" / "id"
    if not path.exists():
        write_atomic(path, secrets.token_hex(4))
    return path.read_text()


def _last_line(log: Path) -> str:
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next(("".join(c for c in line if c.isprintable())[:200] for line in reversed(lines) if line.strip()), "")
    return ""


# ---- the other side --------------------------------------------------------------------------------------------------


class Tool(Protocol):
    """One stage of one run in a tool. A resumed stage is the same run there; its steps may come again."""

    def __init__(self, out: Path, stage: str) -> None: ...

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, whole: bool) -> None: ...


class TensorBoard:
    """OUT/sinks/tensorboard/STAGE. A step that comes again replaces what was there from it on: a session start purges the rest."""

    def __init__(self, out: Path, stage: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        folder = out / "sinks" / "tensorboard" / stage
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"  # read in the order of their names
        self._writer = RecordWriter(open(folder / name, "wb", buffering=0))  # noqa: SIM115
        self._put(file_version="brain.Event:2")
        self._last: int | None = None

    def write(self, step: int, values: dict[str, float]) -> None:
        if self._last is None or step <= self._last:
            self._put(step=step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))
        self._last = step
        told = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._put(step=step, summary=self._summary.Summary(value=told))

    def _put(self, **what: Any) -> None:
        self._writer.write(self._event.Event(wall_time=time.time(), **what).SerializeToString())

    def close(self, whole: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of project $WANDB_PROJECT or "pascaline", a group for each chain. `step` is a metric and the axis, not wandb's own counter,
    which refuses to go back."""

    def __init__(self, out: Path, stage: str) -> None:
        import wandb

        group = f"{out.resolve().name}-{identity(out)}"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "pascaline", group=group, job_type=stage, name=f"{group}-{stage}",
            id=f"{identity(out)}-{stage}", resume="allow", dir=str(out / "sinks"), config=read_json(out / "recipe.json"),
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class Trackio:
    """A run of project $TRACKIO_PROJECT or "pascaline", in trackio's own database."""

    def __init__(self, out: Path, stage: str) -> None:
        import trackio

        group = f"{out.resolve().name}-{identity(out)}"
        project = os.environ.get("TRACKIO_PROJECT") or "pascaline"
        self._run = trackio.init(
            project, f"{group}-{stage}", group=group, resume="allow", config=read_json(out / "recipe.json"), embed=False
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self, whole: bool) -> None:
        self._run.finish()


TOOLS: dict[str, type[Tool]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def main(name: str, out: Path, stage: str) -> None:
    """Rows from standard input into the tool until it ends."""
    tool, whole = None, False
    for line in sys.stdin.buffer:
        whole = line == END
        if whole or not line.endswith(b"\n"):  # a killed trainer's torn line
            break
        row = json.loads(line)
        tool = tool or TOOLS[name](out, stage)
        tool.write(row.pop("step"), row)
    if tool:
        tool.close(whole)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
