"""GGUF files out: a model folder as the one file that llama.cpp and Ollama run, tokenizer and chat template included.

The folder is read and the file written one matrix at a time, so the model need not fit in memory. The format itself is the `gguf`
package's; here is what goes where, for llama.cpp's architectures deepseek2, llama, qwen2 and qwen3 (docs/gguf.md).
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.config import ModelConfig
from pascaline.model.gguf_vocab import vocabulary
from pascaline.model.rope import inverse_frequencies
from pascaline.model.transformer import Model
from pascaline.model.weights import Weights
from pascaline.progress import Progress
from pascaline.runs import atomic_path

TYPES = ("f32", "bf16", "q8_0")
ARCHITECTURES = {"deepseek_v3": "deepseek2", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# A module of a layer -> its name in the file. Whatever a family has of these is written; a name that is missing here is an error.
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.gate.e_score_correction": "exp_probs_b",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)[._](weight|bias)")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. sources: the folder's tensors it is made of, several where experts are stacked, none for a constant;
    part: the view of a source that goes into the file; shape: in the file, without the stack."""

    name: str
    shape: torch.Size
    part: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    sources: list[str] = field(default_factory=list)
    constant: Tensor | None = None

    @property
    def stacked(self) -> tuple[int, ...]:
        return (len(self.sources), *self.shape) if self.name.endswith("_exps.weight") else tuple(self.shape)

    def pieces(self, weights: Weights) -> Iterator[Tensor]:
        if self.constant is not None:
            yield self.constant
        for source in self.sources:
            yield self.part(weights.take(source, torch.float32)).float().reshape(self.shape)


def export(folder: str | Path, path: str | Path, kind: str, quiet: bool = False) -> dict[str, Any]:
    """Write `path` from a model folder, matrices as `kind` (f32, bf16, q8_0), norms, biases and routers always in float32.

    Gives {"file", "type", "bytes", "tensors", "unfit", "notes"}: unfit counts matrices whose rows are no multiple of the type's block
    and which are float32 for it. BadInput for what llama.cpp would not compute the same; `path` is whole or as it was.
    """
    gguf, folder, path = package(), Path(folder), Path(path)
    if kind not in TYPES:
        raise BadInput(f"type '{kind}' is not one of {', '.join(TYPES)}.")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name a file, {path / 'model.gguf'} for one.")
    config, weights = hf.opened(folder)
    _check(config)
    words, notes = vocabulary(folder, config)
    if config.num_nextn_predict_layers:
        notes.append("The MTP modules are left out: llama.cpp reads the model without them.")
    plan = entries(config)
    types = {entry.name: _type(gguf, entry, kind) for entry in plan}
    with atomic_path(path) as temporary, closing(gguf.GGUFWriter(temporary, ARCHITECTURES[config.model_type])) as writer:
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, value in {**{f"{writer.arch}.{k}": v for k, v in keys(config).items()}, **words}.items():
            _add(writer, name, value)
        streams = [_Stream(gguf, entry, weights, types[entry.name]) for entry in plan]
        for entry, stream in zip(plan, streams, strict=True):
            writer.add_tensor_info(entry.name, entry.stacked, np.dtype(np.float32), stream.nbytes, stream.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with Progress("gguf", len(plan), "tensor", enabled=not quiet) as progress:
            for done, stream in enumerate(streams, 1):
                writer.write_tensor_data(stream)
                progress.update(done)
    unfit = sum(_blocked(entry) and types[entry.name].name.lower() != kind for entry in plan)
    return {"file": str(path), "type": kind, "bytes": path.stat().st_size, "tensors": len(plan), "unfit": unfit, "notes": notes}


class _Stream:
    """What write_tensor_data takes for an array: the tensor's bytes, read, encoded and written piece by piece."""

    def __init__(self, gguf: Any, entry: Entry, weights: Weights, kind: Any):
        self.gguf, self.entry, self.weights, self.kind = gguf, entry, weights, kind
        block, size = gguf.GGML_QUANT_SIZES[kind]
        self.nbytes = math.prod(entry.stacked) // block * size

    def tofile(self, file: BinaryIO) -> None:
        for piece in self.entry.pieces(self.weights):
            # numpy's own tofile hides what a full disk says
            file.write(memoryview(self.gguf.quants.quantize(piece.contiguous().numpy(), self.kind)).cast("B"))


def load_into(model: Model, path: str | Path) -> None:
    """Put the weights of a file that `export` wrote from this model's folder into `model`: what llama.cpp computes with."""
    gguf = package()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    config = model.config
    parts = {name: part for own, tensor in model.state_dict().items() for name, part in hf.on_disk(config, own, tensor)}
    with torch.no_grad():
        for entry in entries(config):
            found = stored[entry.name]
            values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).reshape(-1, *entry.shape)
            for source, value in zip(entry.sources, values, strict=False):  # a constant has no source
                part = entry.part(parts[source])
                part.copy_(value.reshape(part.shape))


def package() -> Any:
    """The `gguf` package, or BadInput that says how to get it."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise BadInput("writing GGUF files needs the gguf package: pip install 'pascaline[gguf]'.") from None
    return gguf


def entries(config: ModelConfig) -> list[Entry]:
    """The file's tensors in its order, MTP modules left out."""
    with torch.device("meta"):
        model = Model(config.model_copy(update={"num_nextn_predict_layers": 0}))
    found: dict[str, Entry] = {}
    for own, tensor in model.state_dict().items():
        for source, stored in hf.on_disk(config, own, tensor):
            for name, shape, part in _targets(config, source, stored.shape):
                found.setdefault(name, Entry(name, shape, part)).sources.append(source)
    constants = dict(_constants(config))
    return [*found.values(), *(Entry(name, value.shape, constant=value) for name, value in constants.items())]


def _targets(config: ModelConfig, source: str, shape: torch.Size) -> Iterator[tuple[str, torch.Size, Callable[[Tensor], Tensor]]]:
    """(name in the file, shape there, view of the source) of what a tensor of the folder becomes."""
    match = _NAME.fullmatch(source)
    if not match:
        yield f"{_TOP[source.removesuffix('.weight')]}.weight", shape, lambda tensor: tensor
        return
    layer, module, end = match.groups()
    module = re.sub(r"\.experts\.\d+\.", ".experts.", module)
    if module == "self_attn.kv_b_proj":  # absorbed attention wants keys and values apart, keys the other way round
        heads, keys = config.num_attention_heads, config.qk_nope_head_dim
        rank, values = config.kv_lora_rank, config.v_head_dim
        k_shape, v_shape = torch.Size((heads, rank, keys)), torch.Size((heads, values, rank))
        yield f"blk.{layer}.attn_k_b.weight", k_shape, lambda t: t.unflatten(0, (heads, -1))[:, :keys].transpose(1, 2)
        yield f"blk.{layer}.attn_v_b.weight", v_shape, lambda t: t.unflatten(0, (heads, -1))[:, keys:]
        return
    name = f"blk.{layer}.{_LAYER[module]}.{end}"
    if config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
        # its architecture rotates interleaved pairs, the folder's rows are for pairs of halves
        heads = config.num_attention_heads if module.endswith("q_proj") else config.kv_heads
        yield name, shape, lambda t: t.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    else:
        yield name, shape, lambda t: t


def _constants(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Tensors that no source has: a shared expert of zeros, which deepseek2 cannot be without; frequencies of llama's positions."""
    if config.latent and not config.n_shared_experts:
        D, F = config.hidden_size, config.moe_intermediate_size
        for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
            for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
                yield f"blk.{layer}.ffn_{name}_shexp.weight", torch.zeros(shape)
    if _own_frequencies(config):
        plain = config.rope.model_copy(update={"rope_type": "default"})
        device, dim = torch.device("cpu"), config.rope_dim
        yield "rope_freqs.weight", inverse_frequencies(plain, dim, device) / inverse_frequencies(config.rope, dim, device)


def _blocked(entry: Entry) -> bool:
    """Whether the tensor is a matrix that takes the file's type. A router's rounded score would pick another expert."""
    return len(entry.shape) > 1 and not entry.name.endswith("ffn_gate_inp.weight")


def _type(gguf: Any, entry: Entry, kind: str) -> Any:
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    fits = entry.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if _blocked(entry) and fits else gguf.GGMLQuantizationType.F32


# ---- keys ------------------------------------------------------------------------------------------------------------


def keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of the architecture, without its name before them."""
    c = config
    return {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": c.rope_dim,
        "rope.freq_base": c.rope.rope_theta,
        **_rope_keys(c),
        **(_latent_keys(c) if c.latent else _grouped_keys(c)),
    }


def _grouped_keys(c: ModelConfig) -> dict[str, Any]:
    return {"attention.head_count_kv": c.kv_heads, "attention.key_length": c.qk_head_dim, "attention.value_length": c.qk_head_dim}


def _latent_keys(c: ModelConfig) -> dict[str, Any]:
    """llama.cpp attends in the latent space: one head of keys, of which the values are the first part."""
    out = {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": c.q_lora_rank or 0,  # 0: queries straight from the hidden state; without the key it refuses
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts or 1,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": 2,  # sigmoid
    }
    if c.topk_group < c.n_group:
        out |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    return out


def _rope_keys(c: ModelConfig) -> dict[str, Any]:
    """Scaled positions. With log = ln(factor), llama.cpp rotates by vectors of length attn_factor * (1 + 0.1 log), and deepseek2 multiplies
    scores by the square of that. Given yarn_log_multiplier = m, deepseek2 rotates by the length attn_factor and multiplies scores by
    (attn_factor * (1 + m log))^2."""
    rope = c.rope
    if _own_frequencies(c):
        return {"rope.scaling.type": "none", "rope.scaling.attn_factor": rope.amplitude}
    if rope.rope_type == "default":
        return {}
    out = {"rope.scaling.type": "yarn", "rope.scaling.factor": rope.factor}
    out |= {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
    log, length = math.log(rope.factor), rope.amplitude
    mscale = (c.attention_scale * c.qk_head_dim**0.5) ** 0.5
    if c.latent and not math.isclose(mscale, length, rel_tol=1e-6):
        return out | {"rope.scaling.attn_factor": length, "rope.scaling.yarn_log_multiplier": (mscale / length - 1) / log}
    return out | {"rope.scaling.attn_factor": length / (1 + 0.1 * log)}


def _own_frequencies(c: ModelConfig) -> bool:
    """Whether a tensor of the file gives the frequencies of positions, which llama.cpp reads for llama only."""
    return c.model_type == "llama" and (c.rope.rope_type == "llama3" or not _known_yarn(c))


def _known_yarn(c: ModelConfig) -> bool:
    """Whether YaRN, if any, has the constants that llama.cpp has built in."""
    rope = c.rope
    return rope.rope_type != "yarn" or (rope.beta_fast, rope.beta_slow, rope.truncate) == (32, 1, True)


def _check(c: ModelConfig) -> None:
    """Refuse what llama.cpp would read and compute otherwise."""
    lite = c.num_hidden_layers in (26, 27) or (c.num_hidden_layers == 48 and c.vocab_size == 128256)
    if c.latent and lite and c.q_lora_rank is not None:
        raise BadInput(f"llama.cpp takes a deepseek2 model of {c.num_hidden_layers} layers for one without q_lora_rank; this one has it.")
    if c.latent and c.rms_norm_eps > 1e-5:
        raise BadInput(f"rms_norm_eps = {c.rms_norm_eps:g} cannot be said to llama.cpp, which would take it for the latents' 1e-6 too.")
    if c.model_type == "qwen3" and c.attention_bias:
        raise BadInput("llama.cpp's qwen3 has no biases; this model has attention_bias.")
    if c.model_type != "llama" and (c.rope.rope_type == "llama3" or not _known_yarn(c)):
        wanted = "rope_type llama3" if c.rope.rope_type == "llama3" else "YaRN other than with beta_fast 32, beta_slow 1 and truncate"
        raise BadInput(f"llama.cpp's {ARCHITECTURES[c.model_type]} has no {wanted}.")


def _add(writer: Any, name: str, value: Any) -> None:
    """A key of the type that its value has."""
    for kind, add in ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string)):
        if isinstance(value, kind):
            add(name, value)
            return
    writer.add_array(name, value)
