"""Folders in the layouts of open weights, at toy size, written by safetensors itself, with an index and a config as published."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_model

# What config.json of each says beside its sizes.
_COMMON = dict(
    architectures=["DeepseekV3ForCausalLM"], attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001, ep_size=1,
    hidden_act="silu", initializer_range=0.02, use_cache=True, moe_layer_freq=1, norm_topk_prob=True, pretraining_tp=1,
    scoring_func="sigmoid", seq_aux=True, tie_word_embeddings=False, topk_method="noaux_tc", torch_dtype="bfloat16",
    transformers_version="4.33.1",
)  # fmt: skip
_FP8 = dict(quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]))
_AUTO = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
_YARN = dict(original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0, type="yarn")
_SPECIAL = dict(bos_token_id=0, eos_token_id=1)
_V3 = {
    **_COMMON, **_SPECIAL, **_FP8, "auto_map": _AUTO, "model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "n_group": 4,
    "topk_group": 2, "q_lora_rank": 140, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {**_YARN, "beta_fast": 32, "beta_slow": 1, "factor": 4}, "max_position_embeddings": 128, "n_shared_experts": 1,
}  # fmt: skip
LAYOUTS: dict[str, dict] = {
    "V3": _V3,
    "V3.1": {**_V3, "quantization_config": {**_FP8["quantization_config"], "scale_fmt": "ue8m0"}},
    "R1 without copies": _V3,
    "R1 without MTP": _V3,
    "Moonlight": {
        **_COMMON, "auto_map": _AUTO, "model_type": "deepseek_v3", "num_nextn_predict_layers": 0, "n_group": 1, "topk_group": 1,
        "q_lora_rank": None, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "rope_scaling": None,
        "max_position_embeddings": 128, "n_shared_experts": 2, "bos_token_id": 58, "eos_token_id": 59, "pad_token_id": 60,
    },
    "Kimi-K2": {
        **_COMMON, **_SPECIAL, **_FP8, "auto_map": _AUTO, "model_type": "kimi_k2", "num_nextn_predict_layers": None, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 140, "routed_scaling_factor": 2.827, "rms_norm_eps": 1e-06, "rope_theta": 50000.0,
        "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 4.0}, "max_position_embeddings": 128, "n_shared_experts": 1,
    },
}  # fmt: skip
_SIZES = dict(
    vocab_size=61, hidden_size=160, num_hidden_layers=3, num_attention_heads=2, intermediate_size=200, moe_intermediate_size=136,
    n_routed_experts=8, num_experts_per_tok=3, kv_lora_rank=130, qk_nope_head_dim=70, qk_rope_head_dim=6, v_head_dim=66,
    first_k_dense_replace=1,
)  # fmt: skip
QUANTISED = ("_proj.weight", "_proj_with_mqa.weight")


def tensors(kind: str) -> dict[str, torch.Tensor]:
    """Random weights by their names on disk, in the precision that the folder will have."""
    told = LAYOUTS[kind]
    same = ("n_group", "topk_group", "q_lora_rank", "n_shared_experts", "num_nextn_predict_layers", "max_position_embeddings")
    changes = {**_SIZES, **{key: told[key] or (None if key == "q_lora_rank" else 0) for key in same}}
    state, found = tiny_model(1, **changes).state_dict(), {}
    for name, tensor in state.items():
        found |= _apart(name, tensor, told["q_lora_rank"])
    if kind in ("V3", "V3.1"):
        found |= {"model.layers.3.embed_tokens.weight": found["model.embed_tokens.weight"]}
        found |= {"model.layers.3.shared_head.head.weight": found["lm_head.weight"]}
    if kind == "R1 without MTP":
        found = {name: tensor for name, tensor in found.items() if not name.startswith("model.layers.3.")}
    return {name: tensor.float() if "e_score" in name else tensor.bfloat16() for name, tensor in found.items()}


def _apart(name: str, tensor: torch.Tensor, q_lora_rank: int | None) -> dict[str, torch.Tensor]:
    """As modeling_deepseek.py names them."""
    if tensor.dim() == 3:
        place, _, kind = name.rpartition(".")
        return {k: v for e, own in enumerate(tensor) for k, v in _apart(f"{place}.{e}.{kind}.weight", own, q_lora_rank).items()}
    if "gate_up_proj" in name:
        gate, up = tensor.chunk(2)
        return {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
    if "qkv_a_proj" in name:
        query, latent = tensor[:-136], tensor[-136:]  # kv_lora_rank + qk_rope_head_dim
        return {name.replace("qkv_a", "q_a" if q_lora_rank else "q"): query, name.replace("qkv_a_proj", "kv_a_proj_with_mqa"): latent}
    return {name: tensor}


def quantised(found: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Matrices in fp8 with their scales as V3 stores them; and what they mean, in float32."""
    stored, meant = {}, {}
    for name, tensor in found.items():
        if name.endswith(QUANTISED) and "eh_proj" not in name:
            w = tensor.float()
            scale = torch.empty(-(-w.shape[0] // 128), -(-w.shape[1] // 128))
            q, back = torch.empty_like(w), torch.empty_like(w)
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    tile = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                    scale[i, j] = w[tile].abs().max() / 448
                    q[tile] = (w[tile] / scale[i, j]).to(torch.float8_e4m3fn).float()
                    back[tile] = q[tile] * scale[i, j]
            stored |= {name: q.to(torch.float8_e4m3fn), name + "_scale_inv": scale}
            meant[name] = back
        else:
            stored[name], meant[name] = tensor, tensor.float()
    return stored, meant


def write(folder: Path, kind: str, shards: int = 3) -> dict[str, torch.Tensor]:
    """The folder, with an index and a tokenizer's files and code beside it; what its tensors mean, in float32."""
    folder.mkdir(parents=True)
    config = {**_SIZES, "num_key_value_heads": 2, **LAYOUTS[kind]}
    stored, meant = quantised(tensors(kind)) if "quantization_config" in config else (tensors(kind),) * 2
    names = sorted(stored)
    files = {name: f"model-{number * shards // len(names) + 1:05d}-of-{shards:06d}.safetensors" for number, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: stored[name].contiguous() for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128, "auto_map": {"AutoTokenizer": ["x.X", None]}}))
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("modeling_deepseek.py", "x.py", "training_args.bin", "optimizer.pt", "README.md", "tiktoken.model"):
        (folder / name).write_text("import os")
    return {name: tensor.float() for name, tensor in meant.items()}
