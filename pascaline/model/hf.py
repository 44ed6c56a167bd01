"""Hugging Face folders in and out: config.json, model*.safetensors, generation_config.json.

In memory the experts of a layer are stacked, and matrices with the same input are one (gate and up; query and latent); on disk each
stands alone, as in V3's folders. That, and the copies of embedding and head that V3 stores with each MTP module, is all the
translation there is.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.runs import atomic_path, write_json

SHARD_BYTES = 5 * 10**9
BLOCK = 4096  # rows that are compared at a time
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def save(folder: str | Path, config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write `tensors` (names of Model.state_dict) as a folder that transformers loads. Matrices are stored in `dtype`; router
    biases always in float32. A full disk (OSError) leaves an older model as it was; config.json comes last, so a folder with a
    config is whole."""
    folder = Path(folder)
    disk = dict(_to_disk(config, tensors, dtype))
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(disk):
        if size + disk[name].nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = disk[name]
        size += disk[name].nbytes
    one = len(shards) == 1
    files = ["model.safetensors"] if one else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ExitStack() as renames:
        for file, shard in zip(files, shards, strict=True):
            save_file(shard, renames.enter_context(atomic_path(folder / file)), metadata={"format": "pt"})
        (folder / "config.json").unlink(missing_ok=True)
    for old in folder.iterdir():  # an older index or file would be read in place of the new ones
        if _WEIGHTS.fullmatch(old.name) and old.name not in files:
            old.unlink()
    if not one:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(t.nbytes for t in disk.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    special = {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**special, "do_sample": True, "temperature": 0.6, "top_p": 0.95})
    write_json(folder / "config.json", config.to_hf(str(dtype).removeprefix("torch.")))


def _to_disk(config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)

    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            yield name, tensor.detach().to("cpu", torch.float32).clone()
        else:
            for disk_name, part in _parts(config, name, tensor):
                yield disk_name, copy(part)
    embedding = tensors["model.embed_tokens.weight"]
    for layer in _mtp_layers(config):
        yield f"model.layers.{layer}.embed_tokens.weight", copy(embedding)
        yield f"model.layers.{layer}.shared_head.head.weight", copy(tensors.get("lm_head.weight", embedding))


def _parts(config: ModelConfig, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors on disk that a tensor of ours is made of, as views of it."""
    experts = _EXPERTS.fullmatch(name)
    if experts:
        return [part for e, own in enumerate(tensor) for part in _parts(config, f"{experts[1]}.{e}.{experts[2]}.weight", own)]
    stem, _, end = name.rpartition(".")  # weight or bias
    place, _, kind = stem.rpartition(".")
    if kind == "gate_up_proj":
        names, parts = ["gate_proj", "up_proj"], tensor.chunk(2)
    elif kind == "qkv_a_proj":
        keys = config.kv_lora_rank + config.qk_rope_head_dim
        names = ["q_proj" if config.q_lora_rank is None else "q_a_proj", "kv_a_proj_with_mqa"]
        parts = tensor.split([len(tensor) - keys, keys])
    elif kind == "qkv_proj":
        keys = config.kv_heads * config.qk_head_dim
        names, parts = ["q_proj", "k_proj", "v_proj"], tensor.split([len(tensor) - 2 * keys, keys, keys])
    else:
        return [(name, tensor)]
    return [(f"{place}.{own}.{end}", part) for own, part in zip(names, parts, strict=True)]


def _mtp_layers(config: ModelConfig) -> range:
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def read_config(folder: str | Path) -> ModelConfig:
    """ModelConfig of a folder. A missing or unreadable config.json is BadInput."""
    return ModelConfig.from_hf(_read_json(Path(folder) / "config.json"), str(Path(folder) / "config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path.parent} is not a model folder: it has no {path.name}.") from None
    except OSError as e:
        raise BadInput(f"{path} cannot be read ({e.strerror}).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise BadInput(f"{path} is not valid JSON ({e}).") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a JSON object.")
    return value


class Weights:
    """The tensors of a folder by name, read on demand from model.safetensors or from the shards its index names."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        self.files: dict[str, Any] = {}
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) and f == Path(f).name for f in weight_map.values()):
                raise BadInput(f"{index}: weight_map must map tensor names to file names in the same folder.")
            self.where: dict[str, str] = weight_map
            for file in sorted(set(weight_map.values())):
                missing = {n for n, f in weight_map.items() if f == file} - set(self._open(file).keys())
                if missing:
                    raise BadInput(f"{folder / file} lacks {min(missing)}, which the index promises.")
        else:
            self.where = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")

    def _open(self, file: str) -> Any:
        if file not in self.files:
            path = self.folder / file
            if not path.is_file():
                raise BadInput(f"{self.folder} has no {file}.")
            try:
                self.files[file] = safe_open(path, "pt")
            except (SafetensorError, OSError) as e:
                raise BadInput(f"{path} is truncated or not a safetensors file ({e}).") from None
        return self.files[file]

    def take(self, name: str, shape: torch.Size, rows: slice | None = None) -> Tensor:
        """The tensor of that name, or rows of it; BadInput if it is missing, of another shape, or of a dtype that is not a plain float."""
        if name not in self.where:
            raise BadInput(f"{self.folder} lacks the tensor {name}.")
        view = self._open(self.where[name]).get_slice(name)
        if tuple(view.get_shape()) != tuple(shape):
            raise BadInput(f"{self.folder}: {name} has shape {tuple(view.get_shape())}, the config asks for {tuple(shape)}.")
        if view.get_dtype() not in DTYPES:
            raise BadInput(f"{self.folder}: {name} is {view.get_dtype()}; only {', '.join(DTYPES)} can be loaded.")
        return self._open(self.where[name]).get_tensor(name) if rows is None else view[rows]


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """The model of a folder, in eval mode. Everything in the folder is used or refused: a missing, left-over or misshapen
    tensor is BadInput that names it. MTP modules that the config promises but the files lack (transformers drops them) are left out."""
    config, weights = open_folder(folder)
    with torch.device("meta"):
        model = Model(config)
    check_names(weights, model)
    model.to_empty(device=device).cast_(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for disk_name, part in _parts(config, name, tensor):
                part.copy_(weights.take(disk_name, part.shape))
    return model.eval()


def open_folder(folder: str | Path) -> tuple[ModelConfig, Weights]:
    """The config of a folder, and its tensors to be read on demand."""
    folder = Path(folder)
    config, weights = read_config(folder), Weights(folder)
    first_mtp = f"model.layers.{config.num_hidden_layers}."
    if config.num_nextn_predict_layers and not any(name.startswith(first_mtp) for name in weights.where):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    return config, weights


def read_rows(weights: Weights, config: ModelConfig, name: str, shape: torch.Size, rows: slice) -> Tensor:
    """Rows of the model's tensor `name`, which is of that shape; no others are read. A part on disk is a run of the tensor's memory."""
    whole = torch.empty(shape, device="meta")
    out = torch.empty((rows.stop - rows.start, *shape[1:]))
    begin, flat = rows.start * whole.stride(0), out.view(-1)
    for disk_name, part in _parts(config, name, whole):
        width = part.stride(0)
        first = max(begin - part.storage_offset(), 0) // width
        stop = min(begin + len(flat) - part.storage_offset(), part.numel()) // width
        if first < stop:
            at = part.storage_offset() + first * width - begin
            flat[at : at + (stop - first) * width] = weights.take(disk_name, part.shape, slice(first, stop)).flatten()
    return out


def check_names(weights: Weights, model: Model) -> None:
    """BadInput where the model needs a tensor that the folder lacks, or the folder holds one that the model has no place for."""
    config, folder = model.config, weights.folder
    used = {disk_name for name, tensor in model.state_dict().items() for disk_name, _ in _parts(config, name, tensor)}
    if lacking := used - set(weights.where):
        raise BadInput(f"{folder} lacks the tensor {min(lacking)}.")
    head = "lm_head.weight" if "lm_head.weight" in used else "model.embed_tokens.weight"
    for layer in _mtp_layers(config):
        _check_copy(weights, f"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight", used)
        _check_copy(weights, f"model.layers.{layer}.shared_head.head.weight", head, used)
    if config.tie_word_embeddings:
        _check_copy(weights, "lm_head.weight", "model.embed_tokens.weight", used)
    left = sorted(set(weights.where) - used)
    if left:
        raise BadInput(f"{folder} holds {left[0]}{f' and {len(left) - 1} more' if left[1:] else ''}, which the config has no place for.")


def _check_copy(weights: Weights, copy: str, own: str, used: set[str]) -> None:
    """A stored duplicate must equal what it duplicates, else one of the two would be silently ignored."""
    if copy not in weights.where:
        return
    shape = torch.Size(weights._open(weights.where[own]).get_slice(own).get_shape())
    for first in range(0, shape[0], BLOCK):
        rows = slice(first, min(first + BLOCK, shape[0]))
        if not torch.equal(weights.take(copy, shape, rows), weights.take(own, shape, rows)):
            raise BadInput(f"{weights.folder}: {copy} differs from {own}, of which it must be a copy.")
    used.add(copy)
