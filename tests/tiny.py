"""Small random models for the tests."""

import torch
from torch import nn

from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model


def tiny_config(**changes) -> ModelConfig:
    """deepseek_v3, or another family's by model_type."""
    sizes = dict(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, moe_intermediate_size=12,
        n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        max_position_embeddings=128,
    )  # fmt: skip
    if "model_type" in changes:
        dense = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
        sizes = {name: sizes[name] for name in dense}
    return ModelConfig(**{**sizes, **changes})


@torch.no_grad()
def randomize_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and router bias to something a bug would show on: no ones, no zeros, outputs of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in sorted(state.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if "inv_freq" in name:
            continue
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.3 * noise - 0.3)  # mostly negative: a closed group must still lose to a negative score
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.3 * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)
        else:
            tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)
    return module


def tiny_model(seed: int = 0, **changes) -> Model:
    """A random model in eval mode."""
    model = Model(tiny_config(**changes))
    randomize_(model, seed)
    return model.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
