"""Hugging Face folders in and out: config.json, model*.safetensors, generation_config.json.

In memory the experts of a layer are stacked, and matrices with the same input are one (gate and up; query and latent); on disk each
stands alone, as in V3's folders. That, and the copies of embedding and head that V3 stores with each MTP module, is all the
translation there is.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.model.config import FP8_CONFIG, ModelConfig
from pascaline.model.fp8 import scale_shape
from pascaline.model.transformer import Model
from pascaline.model.weights import FP8, SCALE, Slot, Weights, Writer, read_object, said, writing

SHARD_BYTES = 5 * 10**9
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
# What V3 stores in fp8; embedding, head, norms, routers and eh_proj it does not.
_IN_FP8 = re.compile(r".*\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
HEAD = "reward_head.weight"  # is no part of a folder
_DERIVED = ".self_attn.rotary_emb.inv_freq"  # some folders keep these; they follow from the config


def save(
    folder: str | Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int | None = None
) -> None:
    """Write a folder that transformers loads. tensors: (name, tensor) of Model.state_dict, taken one at a time in any order, on any device.
    Matrices are stored in `dtype`, router biases always in float32; float8_e4m3fn is V3's layout, the rest of it in bfloat16. A full disk
    (OSError) leaves an older model as it was; config.json comes last, so a folder with a config is whole."""
    slots = plan(config, dtype)
    with writing(Path(folder), slots, texts(config, dtype), shard_bytes or SHARD_BYTES) as writer:
        for name, tensor in tensors:
            put(writer, config, name, tensor)
            del tensor  # before the next is fetched


def put(writer: Writer, config: ModelConfig, name: str, tensor: Tensor) -> None:
    """Write a tensor of Model.state_dict wherever it, or a copy of it, stands on disk."""
    copied = copies(config)
    for disk_name, part in on_disk(config, name, tensor):
        for place in (disk_name, *(copy for copy, own in copied.items() if own == disk_name)):
            writer.write(place, part)


def texts(config: ModelConfig, dtype: torch.dtype) -> dict[str, str]:
    """config.json and generation_config.json."""
    fp8 = dtype == torch.float8_e4m3fn
    told = config.to_hf("bfloat16" if fp8 else str(dtype).removeprefix("torch."))
    if fp8:
        told["quantization_config"] = FP8_CONFIG
    special = {k: getattr(config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {**special, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    return {name: json.dumps(value, indent=1) + "\n" for name, value in (("generation_config.json", generation), ("config.json", told))}


def layout(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a folder, in the order of Model.state_dict; the copies of V3's MTP modules come last."""
    with torch.device("meta"):
        state = Model(config).state_dict()
    own = {name: tuple(part.shape) for whole, tensor in state.items() for name, part in on_disk(config, whole, tensor)}
    return own | {copy: own[original] for copy, original in copies(config).items()}


def plan(config: ModelConfig, dtype: torch.dtype) -> dict[str, Slot]:
    """`layout` with what each is stored as."""
    slots: dict[str, Slot] = {}
    for name, shape in layout(config).items():
        slots[name] = Slot(_stored(name, dtype), shape)
        if slots[name].dtype == torch.float8_e4m3fn:
            slots[name + SCALE] = Slot(torch.float32, scale_shape(shape))
    return slots


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    if name.endswith("e_score_correction_bias"):
        return torch.float32
    return torch.bfloat16 if dtype == torch.float8_e4m3fn and not _IN_FP8.fullmatch(name) else dtype


def copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that V3 stores with each MTP module: {name of the copy: what it is a copy of}."""
    own = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    if config.tie_word_embeddings:
        own["shared_head.head"] = own["embed_tokens"]
    depth = config.num_hidden_layers
    layers = range(depth, depth + config.num_nextn_predict_layers)
    return {f"model.layers.{layer}.{copy}.weight": original for layer in layers for copy, original in own.items()}


def on_disk(config: ModelConfig, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors on disk that a tensor of ours is made of, as views of it."""
    if name == HEAD:
        return []
    experts = _EXPERTS.fullmatch(name)
    if experts:
        return [part for e, own in enumerate(tensor) for part in on_disk(config, f"{experts[1]}.{e}.{experts[2]}.weight", own)]
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


def read_config(folder: str | Path) -> ModelConfig:
    """ModelConfig of a folder. A missing or unreadable config.json is BadInput."""
    return ModelConfig.from_hf(read_object(Path(folder) / "config.json"), str(Path(folder) / "config.json"))


def opened(folder: str | Path) -> tuple[ModelConfig, Weights]:
    """Config and weights of a folder, which fit each other: everything there has a place and a sound header. A missing, left-over or
    misshapen tensor, or one of a dtype that cannot be loaded, is BadInput that names it. MTP modules that the config promises but the
    files lack (transformers drops them) are left out."""
    folder = Path(folder)
    config, weights = read_config(folder), Weights(folder)
    if config.num_nextn_predict_layers and not any(n.startswith(f"model.layers.{config.num_hidden_layers}.") for n in weights.entries):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    expected, spare = _expected(config, weights), copies(config)
    if config.tie_word_embeddings:
        spare["lm_head.weight"] = "model.embed_tokens.weight"
    for name, shape in expected.items():
        if name in weights.entries or name not in spare:
            weights.check(name, shape)
    scales = {name + SCALE for name in expected if name in weights.entries and weights.entries[name].dtype == FP8}
    left = sorted(n for n in weights.entries if n not in expected and n not in spare and n not in scales and not n.endswith(_DERIVED))
    if left:
        raise BadInput(
            f"{folder} holds {said(left[0])}{f' and {len(left) - 1} more' if left[1:] else ''}, which the config has no place for."
        )
    for name, original in spare.items():
        if name in weights.entries:
            weights.check(name, expected[original])
            _check_copy(weights, name, original)
    return config, weights


def _expected(config: ModelConfig, weights: Weights) -> dict[str, tuple[int, ...]]:
    """`layout`, unless a config from an enemy asks for a model that would take this machine's memory to think of."""
    depth = config.num_hidden_layers + config.num_nextn_predict_layers
    least = depth + (depth - config.first_k_dense_replace) * config.n_routed_experts
    if least > len(weights.entries):
        raise BadInput(f"{weights.folder} holds {len(weights.entries)} tensors, and by its config there are more than {least}.")
    try:
        return layout(config)
    except (RuntimeError, OverflowError, TypeError):
        raise BadInput(f"{weights.folder / 'config.json'} asks for matrices that no machine holds.") from None


def _check_copy(weights: Weights, copy: str, own: str) -> None:
    """A stored duplicate must equal what it duplicates, else one of the two would be silently ignored."""
    pairs = zip(weights.take(copy).split(1024), weights.take(own).split(1024), strict=True)
    if not all(torch.equal(one.float(), other.float()) for one, other in pairs):
        raise BadInput(f"{weights.folder}: {copy} differs from {own}, of which it must be a copy.")


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """The model of a folder, in eval mode; fp8 comes dequantised. Everything in the folder is used or refused, see `opened`."""
    config, weights = opened(folder)
    with torch.device("meta"):
        model = Model(config)
    model.to_empty(device=device).cast_(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            for disk_name, part in on_disk(config, name, tensor):
                part.copy_(weights.take(disk_name, part.dtype))
    return model.eval()


def read_rows(weights: Weights, config: ModelConfig, name: str, shape: torch.Size, rows: slice) -> Tensor:
    """Rows of the model's tensor `name`, which is of that shape; no others are read. A part on disk is a run of the tensor's memory."""
    whole = torch.empty(shape, device="meta")
    out = torch.empty((rows.stop - rows.start, *shape[1:]))
    begin, flat = rows.start * whole.stride(0), out.view(-1)
    for disk_name, part in on_disk(config, name, whole):
        width = part.stride(0)
        first = max(begin - part.storage_offset(), 0) // width
        stop = min(begin + len(flat) - part.storage_offset(), part.numel()) // width
        if first < stop:
            at = part.storage_offset() + first * width - begin
            flat[at : at + (stop - first) * width] = weights.take(disk_name, torch.float32)[first:stop].flatten()
    return out
