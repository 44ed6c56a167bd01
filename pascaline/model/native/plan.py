"""What the kernels are told of a block: sizes, and where its weights are. Asked again at every step whether that still holds."""

import ctypes
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

MOST_EXPERTS = 1024  # the kernels' own limit


class Shape(ctypes.Structure):
    """block.cpp's, in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "hidden", "heads", "kv_heads", "nope", "rope", "value", "rank", "q_rank", "latent", "entry",
            "width", "experts", "chosen", "groups", "open_groups", "normed", "shared",
        )),
        *((name, ctypes.c_double) for name in ("eps", "latent_eps", "scale", "routed_scale")),
    ]  # fmt: skip


# A field of block.cpp's Weights -> where in the block it is; what a block lacks stays null.
WHERE = {
    "input_norm": ("input_layernorm", "weight"), "qkv": ("self_attn.qkv_proj", "weight"), "qkv_bias": ("self_attn.qkv_proj", "bias"),
    "q_norm": ("self_attn.q_norm", "weight"), "k_norm": ("self_attn.k_norm", "weight"), "q_b": ("self_attn.q_b_proj", "weight"),
    "kv_b": ("self_attn.kv_b_proj", "weight"), "o": ("self_attn.o_proj", "weight"), "o_bias": ("self_attn.o_proj", "bias"),
    "post_norm": ("post_attention_layernorm", "weight"), "gate_up": ("mlp.gate_up_proj", "weight"),
    "gate_up_bias": ("mlp.gate_up_proj", "bias"), "down": ("mlp.down_proj", "weight"), "down_bias": ("mlp.down_proj", "bias"),
    "router": ("mlp.gate", "weight"), "router_bias": ("mlp.gate", "e_score_correction_bias"),
    "experts_gate_up": ("mlp.experts", "gate_up_proj"), "experts_down": ("mlp.experts", "down_proj"),
}  # fmt: skip
LATENT = {
    "qkv": ("self_attn.qkv_a_proj", "weight"), "q_norm": ("self_attn.q_a_layernorm", "weight"),
    "k_norm": ("self_attn.kv_a_layernorm", "weight"),
}  # fmt: skip
SPARSE = {"gate_up": ("mlp.shared_experts.gate_up_proj", "weight"), "down": ("mlp.shared_experts.down_proj", "weight")}


class Weights(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in WHERE]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "threads", "table_width", "routes_stride")),
        *((name, ctypes.c_void_p) for name in ("x", "turn", "out", "entries", "tables", "row", "position", "slot", "routes")),
    ]


class Plan:
    """Of blocks that follow each other. dtype is None where the kernels cannot compute one of them."""

    def __init__(self, blocks: Sequence[Any]):
        self.blocks, self.layer = list(blocks), blocks[0].self_attn.layer
        self.config = blocks[0].self_attn.config
        self.children: list[Any] = []  # modules ...
        self.places: list[tuple[Any, str]] = []  # ... and who holds them under which name
        self.linears: list[nn.Module] = []
        self.slots: list[tuple[Any, str]] = []  # who holds which tensor under which name
        weights, shapes, dtypes = [], [], []
        for block in blocks:
            tensors = self._look(block)
            weights.append(Weights(**{name: t.data_ptr() for name, t in tensors.items()}))
            shapes.append(_shape(block))
            dtypes.append(_dtype(block, tensors))
        self.classes = [nn.Linear] * len(self.linears)
        self.pointers = [held[name].data_ptr() for held, name in self.slots]
        alike = len(set(dtypes)) == 1 and all(b.self_attn.layer == self.layer + i for i, b in enumerate(blocks))
        self.dtype: torch.dtype | None = dtypes[0] if alike else None
        self._alive = shapes, weights
        self.shapes, self.weights = ((ctypes.c_void_p * len(blocks))(*map(ctypes.addressof, each)) for each in (shapes, weights))

    def holds(self, blocks: Sequence[Any]) -> bool:
        """Whether modules, weights and their places are what they were."""
        return (
            self.blocks == blocks
            and list(map(Tensor.data_ptr, [held[name] for held, name in self.slots])) == self.pointers
            and all(map(is_, [held.get(name) for held, name in self.places], self.children))
            and list(map(type, self.linears)) == self.classes
            and blocks[0].self_attn.config is self.config
        )

    def _look(self, block: nn.Module) -> dict[str, Tensor]:
        """The tensors by their fields of Weights, and everything noted that `holds` asks for."""
        modules = dict(block.named_modules())
        where = WHERE | (LATENT if self.config.latent else {}) | (SPARSE if "mlp.gate" in modules else {})
        for module in modules.values():
            self.places += [(module._modules, name) for name in module._modules]
            self.children += module._modules.values()
        self.linears += [m for m in modules.values() if type(m) is nn.Linear]
        tensors = {}
        for field, (path, name) in where.items():
            module = modules.get(path)
            held: Any = {} if module is None else module._buffers if name in module._buffers else module._parameters
            if held.get(name) is not None:
                self.slots.append((held, name))
                tensors[field] = held[name]
        return tensors


def _dtype(block: Any, tensors: dict[str, Tensor]) -> torch.dtype | None:
    """Of a block that the kernels can compute, else None."""
    dtype = tensors["input_norm"].dtype
    good = dtype in (torch.float32, torch.bfloat16) and all(
        t.device.type == "cpu" and t.is_contiguous() and t.dtype is (torch.float32 if name in ("router", "router_bias") else dtype)
        for name, t in tensors.items()
    )
    plain = all(type(m) is nn.Linear for m in block.modules() if isinstance(m, nn.Linear))
    experts = getattr(block.mlp, "experts", None)
    here = experts is None or (experts.dispatch is None and len(tensors["experts_down"]) == len(tensors["router"]) <= MOST_EXPERTS)
    return dtype if good and plain and here else None


def _shape(block: Any) -> Shape:
    c = block.self_attn.config
    sparse, latent = hasattr(block.mlp, "gate"), c.latent
    return Shape(
        hidden=c.hidden_size, heads=c.num_attention_heads, kv_heads=1 if latent else c.kv_heads,
        nope=c.qk_nope_head_dim if latent else c.qk_head_dim, rope=c.rope_dim, value=c.v_head_dim if latent else c.qk_head_dim,
        rank=c.kv_lora_rank, q_rank=c.q_lora_rank or 0, latent=latent, entry=c.cache_width,
        width=c.moe_intermediate_size if sparse else c.intermediate_size, experts=c.n_routed_experts if sparse else 0,
        chosen=c.num_experts_per_tok, groups=c.n_group, open_groups=c.topk_group, normed=c.norm_topk_prob,
        shared=c.n_shared_experts * c.moe_intermediate_size if sparse else 0, eps=c.rms_norm_eps,
        latent_eps=block.self_attn.kv_a_layernorm.eps if latent else 0.0, scale=c.attention_scale, routed_scale=c.routed_scaling_factor,
    )  # fmt: skip
