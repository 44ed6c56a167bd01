"""What the benchmarks of training dynamics share: a small byte-level model, rows of Python's standard library, held-out loss."""

import numpy as np
import torch

from pascaline.data.batch import Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.data.sources import documents
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.train.losses import token_logprobs

ROW, PAD = 128, 256
CONFIG = ModelConfig(
    vocab_size=257, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, moe_intermediate_size=32,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, initializer_range=0.05,
)  # fmt: skip


def texts(count: int = 2_000_000) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out rows of bytes; every tenth file is held out."""
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for i, document in enumerate(documents(["stdlib"], count, lambda _: None)):
        data = np.frombuffer(document.text.encode(), np.uint8).astype(np.int64)
        rows = [data[at : at + ROW] for at in range(0, len(data), ROW)]
        parts[i % 10 == 9].extend(Sample(row, {"ce": np.ones(len(row), np.float32)}) for row in rows if len(row) > 1)
    return parts


@torch.no_grad()
def held_out_loss(model: Model, samples: list[Sample], rows: int = 512) -> float:
    """Mean nats a byte over the first rows."""
    total = count = 0.0
    loader = Loader(ListSamples(samples), ROW, 64, 64, PAD, 0)
    for step in range(rows // 64):
        (batch,) = loader.step(step)
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        logprob, *_ = token_logprobs(hidden[:, :-1].flatten(0, 1), model.head_weight, batch.tokens[:, 1:].flatten())
        weight = batch.streams["ce"][:, 1:].flatten()
        total, count = total - float((weight * logprob).sum()), count + float(weight.sum())
    return total / count
