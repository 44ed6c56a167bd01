"""Small random models for the tests."""

from pathlib import Path

import torch
from torch import nn

from pascaline.data.batch import Batch
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.tokenizer import Tokenizer, train

# What of a row of metrics.jsonl is the machine's, not the run's.
CLOCK = ("seconds", "tokens_per_s", "gemm_share", "rollout_seconds", "verify_seconds", "update_seconds", "other", "rollout_tokens_per_s",
         "update_tokens_per_s")  # fmt: skip


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


@torch.no_grad()
def with_routes(model: Model, found: list[Batch]) -> list[Batch]:
    """The same batches with the experts that the model uses now, recorded as an engine does."""
    for batch in found:
        _, routings = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        chosen = [routing.chosen.view(*batch.tokens.shape, -1) for routing in routings]
        batch.streams["routes"] = torch.stack(chosen, 2).to(torch.uint8)
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


LETTERS = "abcdefghijklmnopqrstuvwxyz "


def tiny_tokenizer() -> Tokenizer:
    """A byte alphabet with a few merges, the special tokens and our chat template."""
    return train(["Make 12 from 6, 6. The answer is 12.", "abc def the cat sat on the mat"] * 3, 300)


@torch.no_grad()
def talker(tokenizer: Tokenizer, seed: int = 0, closes: float = 4.0, ends: float = 0.7, **changes) -> Model:
    """A random model that says letters, and now and then closes its thought or ends its turn, so many times as often as it says one letter.

    The first channel of its residual stream is a constant, which makes the head's first column a bias.
    """
    sizes = dict(vocab_size=tokenizer.vocab_size, max_position_embeddings=512, eos_token_id=tokenizer.end, bos_token_id=tokenizer.begin)
    model = tiny_model(seed, **{**sizes, **changes})
    for name, tensor in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            tensor[..., 0, :] = 0.0
    model.model.embed_tokens.weight[:, 0] = 12.0
    model.model.norm.weight[0] = 1.0
    bias = torch.full((tokenizer.vocab_size,), -8.0)
    bias[[tokenizer.encode(letter)[0] for letter in LETTERS]] = 0.0
    bias[tokenizer.unthink], bias[tokenizer.end] = torch.tensor([closes, ends]).log()
    model.lm_head.weight[:, 0] = bias / 4
    return model


def tiny_folder(folder: Path, **changes) -> Path:
    """A talker and its tokenizer as a model folder."""
    tokenizer = tiny_tokenizer()
    talker(tokenizer, **changes).save(folder)
    tokenizer.save(folder)
    return folder
