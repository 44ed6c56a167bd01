"""The same request and seed give the same tokens: alone or in any company, cold or warm, whole or in chunks, with guesses or without,
interrupted or not (float32 on the CPU)."""

import random

import numpy as np
import pytest
import torch
from tiny import tiny_model

from pascaline.engine import Engine, Sampling
from pascaline.engine.blocks import BLOCK
from pascaline.engine.speculate import Speculation
from pascaline.model import native

KINDS = {
    "latent": dict(num_nextn_predict_layers=1),
    "latent queries": dict(q_lora_rank=10, n_group=4, topk_group=2, num_experts_per_tok=3, num_nextn_predict_layers=1),
    "grouped": dict(model_type="qwen3", num_key_value_heads=1, head_dim=8),
}  # fmt: skip


def asked() -> list[tuple[list[int], Sampling]]:
    """Prompts with common beginnings, of all sorts of settings."""
    draw = np.random.default_rng(3)
    system = draw.integers(3, 61, 37).tolist()
    found = []
    for i in range(9):
        own = draw.integers(3, 61, int(draw.integers(1, 60))).tolist()
        settings = dict(max_tokens=int(draw.integers(1, 40)), seed=i, n=[1, 1, 3][i % 3], min_tokens=i % 4)
        settings |= [dict(temperature=0.0), dict(temperature=1.0, top_p=1.0), dict(temperature=0.7, top_k=20, min_p=0.01)][i // 3]
        settings |= [dict(), dict(), dict(), dict(frequency_penalty=0.5), dict(repetition_penalty=1.2, logit_bias=((7, 2.0),))][i % 5]
        found.append(((system if i % 2 else []) + own, Sampling(**settings)))
    return found


def alone(model, prompt, settings) -> list[tuple[list[int], list[float]]]:
    return [(o.token_ids, o.logprobs) for o in Engine(model, prefix_reuse=False).generate([prompt], settings)[0]]


@pytest.mark.parametrize("by", ["kernels", "PyTorch"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_schedules_give_the_same_tokens(kind, by, kernels, monkeypatch):
    """And by the kernels the same log-probabilities, bit for bit."""
    if by == "kernels" and kernels:
        pytest.skip(kernels)
    if by == "PyTorch":
        monkeypatch.setattr(native, "_library", None)
        monkeypatch.setattr(native, "take", lambda: False)
    model = tiny_model(max_position_embeddings=256, **KINDS[kind])
    with torch.no_grad():
        model.head_weight.mul_(0.3)
    expected = [alone(model, *one) for one in asked()]
    draw, seen = random.Random(0), dict(preemptions=0, prefix_hits=0, accepted_tokens=0)
    for trial in range(12):
        monkeypatch.setattr(Speculation, "pays", lambda self, rows, trial=trial: trial % 3 != 1 and draw.random() < 0.8)
        bytes_per_block = BLOCK * Engine(model, speculate=True).bytes_per_token()
        engine = Engine(
            model, max_rows=draw.choice([1, 3, 8, 40]), max_batch_tokens=draw.choice([8, 40, 300]), speculate=trial % 3 != 1,
            prefix_reuse=trial % 4 != 3, cache_memory=draw.choice([14, 25, 200]) * bytes_per_block,
        )  # fmt: skip
        coming = [(i, *one) for i, one in enumerate(asked()) for _ in range(2)]  # everything twice: the second time warm
        draw.shuffle(coming)
        groups, bystanders = [], []
        while coming or engine.busy:
            if coming and draw.random() < 0.3:
                which, prompt, settings = coming.pop()
                groups.append((which, engine.add(prompt, settings, salt=draw.choice(["", "other"]))))
            if draw.random() < 0.1 and len(bystanders) < 5:
                bystanders += engine.add(draw.choice(asked())[0], Sampling(1.0, 1.0, max_tokens=30, seed=draw.randrange(99), n=2))
            if bystanders and draw.random() < 0.1:
                engine.cancel(draw.choice(bystanders))
            if draw.random() < 0.02:
                engine.flush()
            engine.step()
        for which, group in groups:
            assert [r.token_ids for r in group] == [tokens for tokens, _ in expected[which]], (trial, which)
            exactly = (lambda x: x) if by == "kernels" else (lambda x: pytest.approx(x, abs=1e-4))
            assert all(r.logprobs == exactly(logprobs) for r, (_, logprobs) in zip(group, expected[which], strict=True)), (trial, which)
        assert engine._blocks.used == 0
        seen = {name: count + getattr(engine.stats, name) for name, count in seen.items()}
    assert all(seen[name] for name in ("preemptions", "prefix_hits")), seen
    assert seen["accepted_tokens"] or kind == "grouped"
