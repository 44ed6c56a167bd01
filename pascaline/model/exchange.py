"""Open weights in and out: a model folder written anew, tensor by tensor, in another dtype or in fp8 blocks.

Both directions are one copy. What is read is checked by its headers before anything is written; what is written appears whole.
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pascaline.errors import BadInput, nearest
from pascaline.model import hf
from pascaline.model.config import ModelConfig
from pascaline.model.weights import DTYPES, FP8, Slot, Weights, writing
from pascaline.progress import Progress
from pascaline.runs import atomic_folder
from pascaline.stopping import Interrupt, Stopped

# All that is taken beside config and weights. Code and pickles stay behind.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
IMPORTED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPORTED = IMPORTED | {"fp8": torch.float8_e4m3fn}


def import_folder(source: Path, target: Path, dtype: str = "auto", quiet: bool = False) -> dict[str, Any]:
    """The Hugging Face folder `source` as a model folder at `target`, which must be new or empty. dtype: a name of IMPORTED, or auto:
    each tensor as it is stored, one in fp8 in bfloat16. What was written. BadInput for whatever does not fit, and nothing is written."""
    return _copy("import", source, target, _known(dtype, IMPORTED), quiet)


def export_folder(source: Path, target: Path, dtype: str = "auto", quiet: bool = False) -> dict[str, Any]:
    """The model at `source`, a run's folder or a model's, as a folder at `target`; as import_folder, and dtype may be fp8."""
    inner = source / "model"
    source = inner if (inner / "config.json").exists() and not (source / "config.json").exists() else source
    return _copy("export", source, target, _known(dtype, EXPORTED), quiet)


def name_of(source: Path) -> str:
    """A name for what is imported: the folder's, and in the hub's cache (models--ORG--NAME/snapshots/COMMIT) the model's."""
    path = source.absolute()
    return path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def _known(dtype: str, known: dict[str, torch.dtype]) -> torch.dtype | None:
    if dtype != "auto" and dtype not in known:
        names = ["auto", *known]
        raise BadInput(f"--dtype {dtype} is unknown, there are {', '.join(names)}{nearest(dtype, names) or '.'}")
    return known.get(dtype)


def _copy(verb: str, source: Path, target: Path, dtype: torch.dtype | None, quiet: bool) -> dict[str, Any]:
    began = time.monotonic()
    with atomic_folder(target) as temporary:
        config, weights = hf.opened(source)
        names = hf.layout(config)
        main = dtype or _main_dtype(weights)
        slots = hf.plan(config, dtype) if dtype else {name: Slot(_dtype(weights, config, name), shape) for name, shape in names.items()}
        texts = hf.texts(config, main) | _companions(source)
        _check_room(target, temporary, sum(slot.nbytes for slot in slots.values()))
        with (
            writing(temporary, slots, texts, hf.SHARD_BYTES) as writer,
            Progress(verb, len(names), "tensor", enabled=not quiet) as progress,
            Interrupt() as interrupt,
        ):
            if "tokenizer.json" not in texts:
                progress.note(f"{source} has no tokenizer.json, and so {target} has none")
            done = 0
            for number, name in enumerate(names):
                if interrupt.requested:
                    raise Stopped(f"stopped the {verb} at tensor {number} of {len(names)}, and {target} was not written")
                writer.write(name, weights.take(_stored(weights, config, name), slots[name].dtype))
                done += slots[name].nbytes
                progress.update(number + 1, MB_per_s=done / 1e6 / max(time.monotonic() - began, 1e-9))
        files = len(list(temporary.glob("*.safetensors")))
    size = sum(slot.nbytes for slot in slots.values())
    told = {"folder": str(target), "dtype": "fp8" if main == torch.float8_e4m3fn else str(main).removeprefix("torch.")}
    return told | {"tensors": len(slots), "bytes": size, "files": files, "seconds": time.monotonic() - began}


def _stored(weights: Weights, config: ModelConfig, name: str) -> str:
    """Where the tensor `name` is read: a copy that the folder leaves out is what it would be a copy of."""
    return name if name in weights.entries else hf.copies(config)[name]


def _dtype(weights: Weights, config: ModelConfig, name: str) -> torch.dtype:
    """As stored; router biases in float32 and fp8 in bfloat16."""
    if name.endswith("e_score_correction_bias"):
        return torch.float32
    return DTYPES.get(weights.entries[_stored(weights, config, name)].dtype, torch.bfloat16)


def _main_dtype(weights: Weights) -> torch.dtype:
    """The dtype of most bytes, for config.json."""
    size = Counter[str]()
    for entry in weights.entries.values():
        size["BF16" if entry.dtype == FP8 else entry.dtype] += entry.stop - entry.start
    return DTYPES[size.most_common(1)[0][0]]


def _companions(source: Path) -> dict[str, str]:
    """{name: content} of the known files beside the weights. BadInput for one that is no text, or no JSON though its name says so."""
    found = {}
    for name in COMPANIONS:
        path = source / name
        if not path.is_file():
            continue
        try:
            found[name] = path.read_text(encoding="utf-8")
            if name.endswith(".json"):
                told = json.loads(found[name])
                if isinstance(told, dict) and told.pop("auto_map", None):  # names code that stays behind
                    found[name] = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
        except (ValueError, RecursionError) as e:
            raise BadInput(f"{path} is not valid {'JSON' if name.endswith('.json') else 'UTF-8'} ({e}).") from None
    return found


def _check_room(target: Path, there: Path, size: int) -> None:
    """Said before hours of writing."""
    free = shutil.disk_usage(there).free
    if free < size:
        raise BadInput(f"{target} takes {size / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB left; free some or choose another place.")
