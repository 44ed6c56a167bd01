"""The architecture as numbers. Fields carry the Hugging Face names of `deepseek_v3`, so config.json needs no translation."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pascaline.errors import BadInput, describe_validation

# What transformers writes and we do not need: bookkeeping, derived values, and training-time knobs that live in a recipe.
IGNORED = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "head_dim", "qk_head_dim",
    "num_key_value_heads", "num_local_experts", "pretraining_tp", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size",
    "return_dict", "output_attentions", "output_hidden_states", "_name_or_path", "id2label", "label2id", "chunk_size_feed_forward",
    "is_encoder_decoder", "problem_type",
}  # fmt: skip

# Fields with one value that this model computes. Another value is another model: refused, never ignored.
FIXED: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip


class Rope(BaseModel):
    """Rotary position scaling: `default`, or `yarn` (arXiv 2309.00071) as DeepSeek-V3 uses it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    rope_type: str = "default"
    rope_theta: float = Field(default=10000.0, gt=1)
    factor: float = Field(default=1.0, ge=1)
    original_max_position_embeddings: int = Field(default=4096, ge=1)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @model_validator(mode="after")
    def _known(self) -> "Rope":
        if self.rope_type not in ("default", "yarn"):
            raise ValueError(f"rope_type '{self.rope_type}' is not one of default, yarn")
        if self.rope_type == "yarn" and "factor" not in self.model_fields_set:
            raise ValueError("factor is missing")
        return self

    @property
    def amplitude(self) -> float:
        """The factor on cos and sin: 1 for V3, whose two mscales cancel."""
        if self.rope_type == "default":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 m ln(s) + 1 (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class ModelConfig(BaseModel):
    """One DeepSeek-V3 shaped model: latent attention, sigmoid-routed experts with bias balancing, MTP modules (arXiv 2412.19437)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    q_lora_rank: int | None = None
    kv_lora_rank: int = 32
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    max_position_embeddings: int = 1024
    rope: Rope = Rope()
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 2

    @model_validator(mode="after")
    def _possible(self) -> "ModelConfig":
        for name, value in self:
            least = 0 if name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} is {value}, it must be at least {least}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, it must be even (rotary pairs)")
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts {self.n_routed_experts} does not divide into n_group {self.n_group}")
        if self.n_routed_experts // self.n_group < 2:
            raise ValueError("n_group leaves fewer than 2 experts a group; a group's score is the sum of its best two")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is more than the {reachable} experts a token may reach")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(f"first_k_dense_replace {self.first_k_dense_replace} is more than num_hidden_layers {self.num_hidden_layers}")
        return self

    def extended(self, length: int) -> "ModelConfig":
        """The same model for `length` positions by YaRN, with the constants of DeepSeek-V3 (arXiv 2412.19437, section 4.3). What is
        scaled already is scaled anew from its original length, with its own constants."""
        rope = self.rope.model_dump()
        if self.rope.rope_type == "default":
            rope |= {"original_max_position_embeddings": self.max_position_embeddings, "mscale": 1.0, "mscale_all_dim": 1.0}
        rope |= {"rope_type": "yarn", "factor": length / rope["original_max_position_embeddings"]}
        return self.model_copy(update={"rope": Rope(**rope), "max_position_embeddings": length})

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """Softmax scale: 1/sqrt(nope + rope), times mscale^2 under YaRN (V3 inference code)."""
        mscale = yarn_mscale(self.rope.factor, self.rope.mscale_all_dim or 0.0) if self.rope.rope_type == "yarn" else 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """config.json, in the spelling that V3's own folder uses and every loader of the ecosystem reads."""
        out = {"architectures": ["DeepseekV3ForCausalLM"], **FIXED, **self.model_dump(exclude={"rope"}), "dtype": dtype}
        out["num_key_value_heads"] = self.num_attention_heads
        rope = self.rope.model_dump(exclude_none=True)
        out["rope_theta"] = rope.pop("rope_theta")
        out["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
        return dict(sorted(out.items()))

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read config.json. A field that would change the model and is not honoured here is refused by name (BadInput)."""
        raw = dict(raw)
        for name, value in FIXED.items():
            if raw.get(name, value) != value:
                raise BadInput(f"{where}: {name} = {raw[name]!r} is not supported, only {value!r} is.")
        heads = raw.get("num_attention_heads")
        if raw.get("num_key_value_heads") not in (None, heads):
            raise BadInput(f"{where}: num_key_value_heads must equal num_attention_heads ({heads}) under latent attention.")
        if raw.get("quantization_config"):
            raise BadInput(f"{where}: quantization_config is not supported; dequantise the checkpoint first.")
        fields = {k: v for k, v in raw.items() if k in cls.model_fields}
        read = {*fields, *FIXED, "rope_theta", "rope_scaling", "rope_parameters", "quantization_config"}
        unknown = sorted(set(raw) - read - IGNORED)
        if unknown:
            raise BadInput(f"{where}: {', '.join(unknown)} is not honoured by this model; remove it if it changes nothing.")
        fields["rope"] = _read_rope(raw)
        for name in sorted(_SHAPE - set(fields)):  # transformers' defaults are the 671B model's, ours are a small one's: no guessing
            raise BadInput(f"{where}: {name} is missing.")
        for name in ("n_group", "topk_group", "first_k_dense_replace"):
            if fields[name] is None:  # transformers allows null for its defaults
                raise BadInput(f"{where}: {name} is null; give its number.")
        return cls.checked(fields, where)

    @classmethod
    def checked(cls, fields: dict[str, Any], where: str) -> "ModelConfig":
        """Build and validate; every problem becomes one sentence that names the field (BadInput)."""
        try:
            return cls(**fields)
        except ValidationError as e:
            raise BadInput(describe_validation(e, where, cls.model_fields)) from None


_MAY_BE_ZERO = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "pad_token_id",
                "norm_topk_prob", "tie_word_embeddings"}  # fmt: skip
_SHAPE = set(ModelConfig.model_fields) - {
    "rope", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "num_nextn_predict_layers",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def _read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_theta` + `rope_scaling` (V3's folder) and `rope_parameters` (transformers 5)."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] == "default":  # the numbers of a scaling that is off mean nothing; a name that we do not know might
        return {k: v for k, v in rope.items() if k in ("rope_type", "rope_theta") or k not in Rope.model_fields}
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))  # as transformers does
    return rope


# nano is what `make demo` trains; its routing is V3's, its sizes are chosen for two CPU cores (docs/log.md).
_V3 = dict(
    hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, intermediate_size=18432, moe_intermediate_size=2048,
    n_routed_experts=256, num_experts_per_tok=8, n_shared_experts=1, n_group=8, topk_group=4, first_k_dense_replace=3,
    routed_scaling_factor=2.5, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    vocab_size=129280, max_position_embeddings=163840, num_nextn_predict_layers=1, initializer_range=0.006,
    rope=Rope(rope_type="yarn", factor=40, mscale=1.0, mscale_all_dim=1.0),
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "nano": dict(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384, moe_intermediate_size=128,
        n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        vocab_size=1024, tie_word_embeddings=True, initializer_range=0.05,
    ),
    "mini": dict(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768, moe_intermediate_size=192,
        n_routed_experts=16, num_experts_per_tok=4, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        vocab_size=4096, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "small": dict(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1536, moe_intermediate_size=256,
        n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2, q_lora_rank=256, kv_lora_rank=128,
        qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, vocab_size=16384, max_position_embeddings=4096,
        routed_scaling_factor=1.0, tie_word_embeddings=True,
    ),
    # DeepSeek-V2-Lite's and Moonlight's shape under V3's router.
    "v3-16b": dict(
        hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, intermediate_size=10944, moe_intermediate_size=1408,
        n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, vocab_size=102400, max_position_embeddings=4096, routed_scaling_factor=2.446,
    ),
    "v3-671b": _V3,
}  # fmt: skip


def from_recipe(table: dict[str, Any]) -> ModelConfig:
    """`[model]` of a recipe: `preset` plus any field of ModelConfig. Unknown names and impossible shapes are BadInput."""
    from pascaline.errors import nearest

    table = dict(table)
    name = table.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise BadInput(f"model.preset '{name}' is unknown{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}.")
    return ModelConfig.checked({**PRESETS.get(name or "", {}), **table}, "model")
