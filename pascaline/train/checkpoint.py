"""The resume state of a training stage: tensors in safetensors, the rest in JSON. Nothing executable is written or read.

A checkpoint is a folder `state/step-N` that appears whole by a rename; `torch.distributed.checkpoint` is not used because
reading its metadata file can run code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.runs import sync_folder, write_json


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], keep_last: int = 1, keep_every: int = 0) -> None:
    """Write state/step-N with its checksum, then drop the older ones but the last keep_last and every keep_every-th step.

    A full disk leaves the old checkpoints as they were (an error that `runs.disk_full` knows)."""
    state = folder / "state"
    state.mkdir(parents=True, exist_ok=True)
    temporary = state / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        file = temporary / "tensors.safetensors"
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()} | {"rng": torch.get_rng_state()}, file)
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
        write_json(temporary / "state.json", {"step": step, "sha256": _checksum(file), **facts})
        if (state / f"step-{step}").exists():
            shutil.rmtree(state / f"step-{step}")
        os.rename(temporary, state / f"step-{step}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(state)
    saved = steps(folder)
    kept = {f"step-{s}" for i, s in enumerate(saved) if i >= len(saved) - keep_last or (keep_every and s % keep_every == 0)}
    for other in state.iterdir():
        if other.name not in kept:
            shutil.rmtree(other, ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """The steps of a stage's whole checkpoints, oldest first."""
    names = (p.name.removeprefix("step-") for p in (folder / "state").glob("step-*") if (p / "state.json").exists())
    return sorted(int(name) for name in names if name.isdecimal())


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints later than `step`."""
    for later in steps(folder):
        if later > step:
            shutil.rmtree(folder / "state" / f"step-{later}")


def load(folder: Path, choices: Iterable[int], say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of the first of the steps `choices` whose checkpoint is undamaged, and the global RNG as it was; None
    without choices. A damaged one is named to `say` and passed over; BadInput if all are damaged."""
    why = ""
    for step in choices:
        path = folder / "state" / f"step-{step}"
        try:
            found = _load(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
            why = f"the checkpoint {path} is damaged ({e})"
            continue
        if why:
            say(f"{why}; going on from {path.name}")
        return found
    if why:
        raise BadInput(f"{why} and there is no other; delete it, or start over with --fresh.")
    return None


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
    int(facts["step"])
    file = path / "tensors.safetensors"
    if _checksum(file) != facts["sha256"]:
        raise ValueError("its checksum is wrong")
    tensors = load_file(file)
    torch.set_rng_state(tensors.pop("rng"))
    return tensors, facts


def _checksum(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
