"""Named sizes, and the `[model]` table of a recipe."""

from typing import Any

from pascaline.errors import BadInput, nearest
from pascaline.model.config import ModelConfig, Rope

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
    # Dense students of the shape of Qwen3: nano-dense takes about as much arithmetic for a token as nano.
    "nano-dense": dict(
        model_type="qwen3", hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=384, vocab_size=1024, tie_word_embeddings=True, initializer_range=0.05,
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


def from_recipe(table: dict[str, Any], where: str = "model") -> ModelConfig:
    """`[model]` of a recipe, or another table `where`: `preset` plus any field of ModelConfig. Unknown names and impossible shapes are
    BadInput."""
    table = dict(table)
    name = table.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise BadInput(f"{where}.preset '{name}' is unknown{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}.")
    return ModelConfig.checked({**PRESETS.get(name or "", {}), **table}, where)
