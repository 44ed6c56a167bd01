"""What the kernels are told of a block: sizes, and where its weights are. Asked again at every step whether that still holds."""

import ctypes
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
        *((name, ctypes.c_int64) for name in ("n", "threads", "table_width")),
        *((name, ctypes.c_void_p) for name in ("x", "turn", "out", "entries", "tables", "row", "position", "slot")),
    ]


class Plan:
    """Of one Block. dtype is None where the kernels cannot compute it."""

    dtype: torch.dtype | None

    def __init__(self, block: nn.Module):
        self.config, self.layer = block.self_attn.config, block.self_attn.layer
        modules = dict(block.named_modules())
        where = WHERE | (LATENT if self.config.latent else {}) | (SPARSE if "mlp.gate" in modules else {})
        self.children = [(m._modules, name, child) for m in modules.values() for name, child in m._modules.items()]
        self.classes = [(m, type(m)) for m in modules.values() if isinstance(m, nn.Linear)]
        self.slots: list[tuple[Any, str]] = []
        fields = []
        for field, (path, name) in where.items():
            module = modules.get(path)
            held = {} if module is None else module._buffers if name in module._buffers else module._parameters
            if held.get(name) is not None:
                fields.append(field)
                self.slots.append((held, name))
        tensors = dict(zip(fields, (held[name] for held, name in self.slots), strict=True))
        self.pointers = [t.data_ptr() for t in tensors.values()]
        self.dtype = self._dtype(modules, tensors)
        self.kernel = f"block_{str(self.dtype).removeprefix('torch.')}"
        self.weights = Weights(**dict(zip(fields, self.pointers, strict=True)))
        self.shape = self._shape(block)
        self.weights_at, self.shape_at = ctypes.addressof(self.weights), ctypes.addressof(self.shape)
        self.dispatch = modules.get("mlp.experts")

    def holds(self, block: nn.Module) -> bool:
        """Whether modules, weights and their places are what they were."""
        return (
            [held[name].data_ptr() for held, name in self.slots] == self.pointers
            and all(held.get(name) is child for held, name, child in self.children)
            and all(type(module) is kind for module, kind in self.classes)
            and block.self_attn.config is self.config
        )

    def _dtype(self, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> torch.dtype | None:
        float32 = {"router", "router_bias"}
        dtype = tensors["input_norm"].dtype
        good = dtype in (torch.float32, torch.bfloat16) and all(
            t.device.type == "cpu" and t.is_contiguous() and t.dtype == (torch.float32 if name in float32 else dtype)
            for name, t in tensors.items()
        )
        plain = all(type(m) is nn.Linear for m in modules.values() if isinstance(m, nn.Linear))
        experts = modules.get("mlp.experts")
        held = experts is None or (experts.dispatch is None and len(tensors["experts_gate_up"]) == len(tensors["router"]) <= MOST_EXPERTS)
        return dtype if good and plain and held else None

    def _shape(self, block: nn.Module) -> Shape:
        c = self.config
        sparse = hasattr(block.mlp, "gate")
        grouped = not c.latent
        return Shape(
            hidden=c.hidden_size, heads=c.num_attention_heads, kv_heads=c.kv_heads if grouped else 1,
            nope=c.qk_head_dim if grouped else c.qk_nope_head_dim, rope=c.rope_dim, value=c.qk_head_dim if grouped else c.v_head_dim,
            rank=c.kv_lora_rank, q_rank=c.q_lora_rank or 0, latent=c.latent, entry=c.cache_width,
            width=c.moe_intermediate_size if sparse else c.intermediate_size, experts=c.n_routed_experts if sparse else 0,
            chosen=c.num_experts_per_tok, groups=c.n_group, open_groups=c.topk_group, normed=c.norm_topk_prob,
            shared=c.n_shared_experts * c.moe_intermediate_size if sparse else 0,
            eps=c.rms_norm_eps, latent_eps=block.self_attn.kv_a_layernorm.eps if c.latent else 0.0, scale=c.attention_scale, routed_scale=c.routed_scaling_factor,
        )  # fmt: skip
