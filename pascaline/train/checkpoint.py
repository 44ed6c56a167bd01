"""The resume state of a training stage: tensors in safetensors, the rest in JSON. Nothing executable is written or read.

A checkpoint is a folder `state/step-N` that appears whole by a rename; `torch.distributed.checkpoint` is not used because
reading its metadata file can run code.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.runs import sync_folder, write_json


def save(folder: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write state/step-N and then drop the older ones. A full disk leaves the old checkpoint as it was (an error
    that `runs.disk_full` knows)."""
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
        write_json(temporary / "state.json", {"step": step, **facts})
        if (state / f"step-{step}").exists():
            shutil.rmtree(state / f"step-{step}")
        os.rename(temporary, state / f"step-{step}")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(state)
    for other in state.iterdir():
        if other.name != f"step-{step}":
            shutil.rmtree(other, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a stage, or None."""
    found = [p for p in (folder / "state").glob("step-*") if (p / "state.json").exists()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint; restores the global RNG. A damaged one is BadInput."""
    try:
        tensors = load_file(path / "tensors.safetensors")
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        int(facts["step"])
        torch.set_rng_state(tensors.pop("rng"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"the checkpoint {path} is damaged ({e}); delete it, or start over with --fresh.") from None
    return tensors, facts
