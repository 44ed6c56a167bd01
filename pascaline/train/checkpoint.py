"""The resume state of a training stage: tensors in safetensors, the rest in JSON. Nothing executable is written or read.

A checkpoint is a folder `state/step-N` that appears whole by a rename. Its tensors go through torch.distributed.checkpoint, in its
Hugging Face format (its own has a pickled index): each rank writes the rows it holds, and any number of ranks reads them.
"""

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from pascaline.errors import BadInput
from pascaline.runs import sync_folder, write_json
from pascaline.train.parallel import ALONE, Ranks, like, local

RNG = "rng"
Say = Callable[[str], None]
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # it notes every tensor, at half the cost of a small save
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake


class Saver:
    """Writes checkpoints while training goes on: `save` copies the state and returns, a thread writes the copy.

    One is written at a time. Afterwards the older ones are dropped but the last `keep_last` and every `keep_every`-th step's. A failed
    write leaves the old ones as they were and is told by `wait` (for a full disk an error that `runs.disk_full` knows).
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int, ranks: Ranks = ALONE):
        self.folder, self.keep_last, self.keep_every, self.ranks = folder, keep_last, keep_every, ranks.beside()
        self.step = 0  # that was saved last
        self._copy: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Start to write state/step-N from the state as it is now; the one before must have been waited for."""
        self._stage({**tensors, RNG: torch.get_rng_state()})
        self.step = step
        self._writing = self._thread.submit(self._write, step, facts)

    @property
    def finished(self) -> bool:
        """Whether there is a written (or failed) checkpoint that nobody waited for yet."""
        return self._writing is not None and self._writing.done()

    def wait(self) -> None:
        """Until the checkpoint being written is on the disk; raises what kept it from there."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()  # waits for the last one, also on the way out of an error, which is told in its place

    def _stage(self, tensors: dict[str, Tensor]) -> None:
        """Copy to the host, into the memory of the copy before where there is one."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            share, old = local(tensor.detach()), self._copy.get(name)
            copy = torch.empty(share.shape, dtype=share.dtype) if old is None else local(old)
            copies[name] = like(copy.copy_(share), tensor)
        self._copy = copies

    def _write(self, step: int, facts: dict[str, Any]) -> None:
        state = self.folder / "state"
        temporary = state / f".step-{step}.tmp"
        try:
            _store(self._copy, temporary, self.ranks)
            own = sorted(temporary.glob(f"shard-{self.ranks.rank + 1:05d}-*"))
            sums: dict[str, str] = {}
            for part in self.ranks.gather({file.name: _checksum(file) for file in own}):
                sums |= part
            self.ranks.tell(self._publish(temporary, step, {"step": step, "sha256": sums, **facts}) if self.ranks.leader else None)
        except BaseException:
            if self.ranks.leader:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _publish(self, temporary: Path, step: int, facts: dict[str, Any]) -> OSError | None:
        """Give the whole folder its name; what went wrong, for all ranks to hear."""
        final = temporary.with_name(f"step-{step}")
        try:
            write_json(temporary / "state.json", facts)
            sync_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync_folder(final.parent)
        except OSError as e:
            return e
        saved = steps(self.folder)
        kept = {f"step-{s}" for s in saved if s in saved[-self.keep_last :] or (self.keep_every and s % self.keep_every == 0)}
        for other in final.parent.iterdir():
            if other.name not in kept:
                shutil.rmtree(other, ignore_errors=True)
        return None


def _store(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=ranks.hosts, no_dist=ranks.size == 1)
    except CheckpointException as e:
        raise _cause(e) from None


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's own error."""
    return next(iter(error.failures.values()))[0]


def steps(folder: Path) -> list[int]:
    """The steps of a stage's whole checkpoints, oldest first."""
    names = (p.name.removeprefix("step-") for p in (folder / "state").glob("step-*") if (p / "state.json").exists())
    return sorted(int(name) for name in names if name.isdecimal())


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints later than `step`, and what a killed run left half written."""
    for later in steps(folder):
        if later > step:
            shutil.rmtree(folder / "state" / f"step-{later}")
    for left in (folder / "state").glob(".step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def load(
    folder: Path, choices: Iterable[int], room: Callable[[set[str]], dict[str, Tensor]], say: Say, ranks: Ranks = ALONE
) -> dict[str, Any] | None:
    """Read the first of the steps `choices` whose checkpoint is undamaged into the tensors that `room` gives for the names in it, and
    set the global RNG as it was; the facts saved with it. None without choices. A damaged one is named to `say` and passed over;
    BadInput if all are damaged."""
    why = ""
    for step in choices:
        path = folder / "state" / f"step-{step}"
        try:
            facts, trouble = _verified(path, ranks), ""
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            trouble = str(e)
        if found := [told for told in ranks.gather(trouble) if told]:
            why = f"the checkpoint {path} is damaged ({found[0]})"
            continue
        _fetch(path, room, ranks)
        if why:
            say(f"{why}; going on from {path.name}")
        return facts
    if why:
        raise BadInput(f"{why} and there is no other; delete it, or start over with --fresh.")
    return None


def _fetch(path: Path, room: Callable[[set[str]], dict[str, Tensor]], ranks: Ranks) -> None:
    reader = HuggingFaceStorageReader(str(path))
    names = set(reader.read_metadata().state_dict_metadata)
    rng = torch.get_rng_state()
    try:
        dcp.load({**room(names - {RNG}), RNG: rng}, storage_reader=reader, process_group=ranks.hosts, no_dist=ranks.size == 1)
    except CheckpointException as e:
        raise _cause(e) from None
    torch.set_rng_state(rng)


def _verified(path: Path, ranks: Ranks) -> dict[str, Any]:
    """The facts of a checkpoint whose files are what was written; each rank checks its part of them."""
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    int(facts["step"])
    for name in sorted(facts["sha256"])[ranks.rank :: ranks.size]:
        if _checksum(path / name) != facts["sha256"][name]:
            raise ValueError(f"the checksum of {name} is wrong")
    return dict(facts)


def _checksum(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
