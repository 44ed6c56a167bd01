"""The architecture as numbers. Fields carry Hugging Face's names, so config.json needs no translation."""

import math
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pascaline.errors import BadInput, describe_validation

# What transformers writes and we do not need: bookkeeping, derived values, and training-time knobs that live in a recipe.
IGNORED = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "head_dim", "qk_head_dim",
    "num_key_value_heads", "num_local_experts", "pretraining_tp", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size",
    "return_dict", "output_attentions", "output_hidden_states", "_name_or_path", "id2label", "label2id", "chunk_size_feed_forward",
    "is_encoder_decoder", "problem_type", "transformers.js_config", "unsloth_fixed", "unsloth_version",
}  # fmt: skip

# Fields of published folders that change nothing with this value.
OFF: dict[str, Any] = {"use_mrope": False, "rope_interleaved": False, "is_llama_config": True}


class Family(NamedTuple):
    """One model_type. fixed: fields of config.json with one value that this model computes (another value is another model: refused,
    never ignored); absent: what transformers reads where a field is missing; ignored: fields that say nothing while `fixed` holds."""

    architecture: str
    fixed: dict[str, Any]
    absent: dict[str, Any] = {}  # noqa: RUF012
    ignored: frozenset[str] = frozenset()


_WINDOWED = frozenset({"sliding_window", "max_window_layers", "layer_types"})  # of attention windows that are off
_PLAIN = {"hidden_act": "silu", "attention_dropout": 0.0}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FAMILIES = {
    "deepseek_v3": Family("DeepseekV3ForCausalLM", {**_PLAIN, "attention_bias": False, "scoring_func": "sigmoid",
                          "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True}),
    "llama": Family("LlamaForCausalLM", _PLAIN, {**_NO_IDS, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen2": Family("Qwen2ForCausalLM", {**_PLAIN, "use_sliding_window": False}, _NO_IDS, _WINDOWED),
    "qwen3": Family("Qwen3ForCausalLM", {**_PLAIN, "use_sliding_window": False}, {**_NO_IDS, "head_dim": 128}, _WINDOWED),
}  # fmt: skip


# quantization_config of V3's folders: fp8 in blocks (pascaline.model.fp8).
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


class Rope(BaseModel):
    """Rotary position scaling: `default`, `yarn` (arXiv 2309.00071) or `llama3` (Llama 3.1, arXiv 2407.21783 section 3.4.1)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    rope_type: str = "default"
    rope_theta: float = Field(default=10000.0, gt=1)
    factor: float = Field(default=1.0, ge=1)
    original_max_position_embeddings: int = Field(default=4096, ge=1)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)

    @model_validator(mode="after")
    def _known(self) -> "Rope":
        if self.rope_type not in SCALINGS:
            raise ValueError(f"rope_type '{self.rope_type}' is not one of {', '.join(SCALINGS)}")
        if self.rope_type != "default" and "factor" not in self.model_fields_set:
            raise ValueError("factor is missing")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor:g} must be more than low_freq_factor {self.low_freq_factor:g}")
        return self

    @property
    def amplitude(self) -> float:
        """The factor on cos and sin: 1 for V3, whose two mscales cancel."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def scaling(self) -> dict[str, Any] | None:
        """`rope_scaling` of config.json without its type: what the type reads, None for no scaling."""
        own = self.model_dump(include=SCALINGS[self.rope_type], exclude_none=True)
        if own.get("truncate"):
            del own["truncate"]  # every loader's default
        return own or None


# Which fields each rope_type reads.
SCALINGS: dict[str, set[str]] = {
    "default": set(),
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
             "truncate"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}  # fmt: skip


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 m ln(s) + 1 (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class ModelConfig(BaseModel):
    """One model. `deepseek_v3`: latent attention, sigmoid-routed experts with bias balancing, MTP modules (arXiv 2412.19437). `llama`,
    `qwen2`, `qwen3`: grouped queries (arXiv 2305.13245) and dense layers; qwen2 has biases on queries, keys and values, qwen3 norms on
    the heads' queries and keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model_type: Literal["deepseek_v3", "llama", "qwen2", "qwen3"] = "deepseek_v3"
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
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 1024
    rope: Rope = Rope()
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 2

    @model_validator(mode="before")
    @classmethod
    def _of_its_family(cls, raw: Any) -> Any:
        """A dense family has neither latents nor experts: all its layers are dense, and those fields are as good as absent."""
        if not isinstance(raw, dict) or raw.get("model_type", "deepseek_v3") == "deepseek_v3":
            return raw
        raw = {**raw}
        for name, value in {**_NO_EXPERTS, "first_k_dense_replace": raw.get("num_hidden_layers")}.items():
            if raw.setdefault(name, value) != value:
                raise ValueError(f"{name} is no field of {raw['model_type']}, which has no latent attention and no experts")
        heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
        if raw.get("num_key_value_heads") is None:
            raw["num_key_value_heads"] = heads
        if raw.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            raw["head_dim"] = hidden // heads
        return raw

    @model_validator(mode="after")
    def _possible(self) -> "ModelConfig":
        dense = set() if self.latent else set(_NO_EXPERTS)
        for name, value in self:
            least = 0 if name in _MAY_BE_ZERO or name in dense else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} is {value}, it must be at least {least}")
        if self.rope_dim % 2:
            which = "qk_rope_head_dim" if self.latent else "head_dim"
            raise ValueError(f"{which} is {self.rope_dim}, it must be even (rotary pairs)")
        if self.latent:
            self._check_latent()
        elif self.num_attention_heads % self.kv_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} does not divide into num_key_value_heads {self.kv_heads}")
        if (self.attention_bias and self.model_type not in ("llama", "qwen3")) or (self.mlp_bias and self.model_type != "llama"):
            raise ValueError(f"{'mlp_bias' if self.mlp_bias else 'attention_bias'} is no field of {self.model_type}")
        return self

    def _check_latent(self) -> None:
        if self.num_key_value_heads is not None or self.head_dim is not None:
            raise ValueError("num_key_value_heads and head_dim follow from the other fields under latent attention; leave them out")
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

    def extended(self, length: int) -> "ModelConfig":
        """The same model for `length` positions by YaRN, with the constants of DeepSeek-V3 (arXiv 2412.19437, section 4.3). What is
        scaled by YaRN already is scaled anew from its original length, with its own constants."""
        rope = self.rope.model_dump()
        if self.rope.rope_type == "llama3":
            raise BadInput(
                "this model's positions are scaled the way of Llama 3.1 already; extending them by YaRN as well is not known to work."
            )
        if self.rope.rope_type == "default":
            rope |= {"original_max_position_embeddings": self.max_position_embeddings}
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0} if self.latent else {}  # V3's is in the softmax scale
        rope |= {"rope_type": "yarn", "factor": length / rope["original_max_position_embeddings"]}
        return self.model_copy(update={"rope": Rope(**rope), "max_position_embeddings": length})

    @property
    def latent(self) -> bool:
        """Whether attention is latent (MLA), else over grouped queries."""
        return self.model_type == "deepseek_v3"

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, each shared by num_attention_heads / kv_heads queries (grouped attention)."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def qk_head_dim(self) -> int:
        """Numbers in a query."""
        return self.head_dim or self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        """Numbers of a query that positions rotate."""
        return self.head_dim or self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that decoding keeps a token and layer: a latent and a rotary key, or keys and values."""
        return self.kv_lora_rank + self.qk_rope_head_dim if self.latent else 2 * self.kv_heads * self.qk_head_dim

    @property
    def attention_scale(self) -> float:
        """Softmax scale: 1/sqrt(numbers in a query), times mscale^2 under V3's YaRN (V3 inference code)."""
        mscale = 1.0
        if self.latent and self.rope.rope_type == "yarn":
            mscale = yarn_mscale(self.rope.factor, self.rope.mscale_all_dim or 0.0)
        return self.qk_head_dim**-0.5 * mscale * mscale

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """config.json, in the spelling that the families' own folders use and every loader of the ecosystem reads."""
        family = FAMILIES[self.model_type]
        own = self.model_dump(exclude={"rope"} | _unknown_to(self.model_type))
        out = {"architectures": [family.architecture], **family.fixed, **own, "dtype": dtype}
        out.setdefault("num_key_value_heads", self.num_attention_heads)
        scaling, kind = self.rope.scaling(), "type" if self.latent else "rope_type"
        out["rope_theta"] = self.rope.rope_theta
        out["rope_scaling"] = scaling and {kind: self.rope.rope_type, **scaling}
        return dict(sorted(out.items()))

    @classmethod
    def from_hf(cls, raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read config.json. A field that would change the model and is not honoured here is refused by name (BadInput)."""
        name = raw.get("model_type", "deepseek_v3")
        if name == "kimi_k2":  # V3's architecture; the name is for servers to choose a parser of its tool calls by
            name = "deepseek_v3"
            raw = {**raw, "model_type": name}
        if raw.get("num_nextn_predict_layers", 0) is None:
            raw = {**raw, "num_nextn_predict_layers": 0}
        if name not in FAMILIES:
            raise BadInput(f"{where}: model_type = {name!r} is not supported, only {', '.join(FAMILIES)} are.")
        family = FAMILIES[name]
        raw = {**family.absent, **raw}
        for field, value in family.fixed.items():
            if raw.get(field, value) != value:
                raise BadInput(f"{where}: {field} = {raw[field]!r} is not supported, only {value!r} is.")
        if set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise BadInput(f"{where}: layer_types other than full_attention are not supported.")
        heads = raw.get("num_attention_heads")
        if name == "deepseek_v3" and raw.get("num_key_value_heads") not in (None, heads):
            raise BadInput(f"{where}: num_key_value_heads must equal num_attention_heads ({heads}) under latent attention.")
        _check_quantisation(raw.get("quantization_config"), where)
        foreign = _unknown_to(name)
        fields = {k: v for k, v in raw.items() if k in cls.model_fields and k not in foreign}
        read = {*fields, *family.fixed, "rope_theta", "rope_scaling", "rope_parameters", "quantization_config"}
        unknown = sorted(k for k in set(raw) - read - family.ignored - IGNORED if k not in OFF or raw[k] != OFF[k])
        if unknown:
            raise BadInput(f"{where}: {', '.join(unknown)} is not honoured by this model; remove it if it changes nothing.")
        fields["rope"] = _read_rope(raw)
        # transformers' defaults are the 671B model's, ours are a small one's: no guessing.
        for field in sorted(_SHAPE - foreign - set(fields)):
            raise BadInput(f"{where}: {field} is missing.")
        for field in ("n_group", "topk_group", "first_k_dense_replace"):
            if field in fields and fields[field] is None:  # transformers allows null for its defaults
                raise BadInput(f"{where}: {field} is null; give its number.")
        return cls.checked(fields, where)

    @classmethod
    def checked(cls, fields: dict[str, Any], where: str) -> "ModelConfig":
        """Build and validate; every problem becomes one sentence that names the field (BadInput)."""
        try:
            return cls(**fields)
        except ValidationError as e:
            raise BadInput(describe_validation(e, where, cls.model_fields)) from None


_MAY_BE_ZERO = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "pad_token_id",
                "norm_topk_prob", "tie_word_embeddings", "attention_bias", "mlp_bias"}  # fmt: skip
# The fields of latent attention and experts, as they stand where there are neither; and those of the dense families.
_NO_EXPERTS: dict[str, Any] = dict(
    moe_intermediate_size=0, n_routed_experts=0, num_experts_per_tok=0, n_shared_experts=0, n_group=0, topk_group=0, norm_topk_prob=False,
    routed_scaling_factor=1.0, q_lora_rank=None, kv_lora_rank=0, qk_nope_head_dim=0, qk_rope_head_dim=0, v_head_dim=0,
    num_nextn_predict_layers=0,
)  # fmt: skip
_DENSE_ONLY = ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")
_SHAPE = set(ModelConfig.model_fields) - {
    "model_type", "rope", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "num_nextn_predict_layers",
    "bos_token_id", "eos_token_id", "pad_token_id", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias",
}  # fmt: skip


def _check_quantisation(told: Any, where: str) -> None:
    """Weights in V3's fp8 are dequantised when they are read; what is said of activations is for those who compute in fp8."""
    asked = ("quant_method", "fmt", "weight_block_size")
    if told and (not isinstance(told, dict) or any(told.get(key) != FP8_CONFIG[key] for key in asked)):
        raise BadInput(f"{where}: this quantization_config is not supported, only V3's fp8 is: { ({k: FP8_CONFIG[k] for k in asked}) }.")


def _unknown_to(model_type: str) -> set[str]:
    """Fields of ModelConfig that config.json of this family does not have."""
    if model_type == "deepseek_v3":
        return set(_DENSE_ONLY)
    biases = {"llama": set(), "qwen2": {"attention_bias", "mlp_bias"}, "qwen3": {"mlp_bias"}}
    return {*_NO_EXPERTS, "first_k_dense_replace"} | biases[model_type]


def _read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_theta` + `rope_scaling` (V3's folder) and `rope_parameters` (transformers 5)."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] == "default":  # the numbers of a scaling that is off mean nothing; a name that we do not know might
        return {k: v for k, v in rope.items() if k in ("rope_type", "rope_theta") or k not in Rope.model_fields}
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))  # as transformers does
    return rope
