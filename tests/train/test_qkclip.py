"""QK-clip: the scores it measures are the scores, and after it none is above tau."""

import pytest
import torch
from tiny import relative_error, tiny_model
from trainee import Watched, loader, rows, trainer, weights

from pascaline.model.attention import LatentAttention, largest_logits, visible
from pascaline.tables import Optim
from pascaline.train.optim import Optimizer
from pascaline.train.qkclip import QKClip


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [dict(), dict(q_lora_rank=12), dict(num_nextn_predict_layers=1)]


@pytest.mark.parametrize("length", [5, 128, 300])
def test_the_largest_logits_are_those_of_the_plain_product(length):
    q, k = randn(2, 3, length, 8), randn(2, 3, length, 8, seed=1)
    documents = (torch.arange(length) // 50).expand(2, -1)
    mask = visible(documents, 2, length, q.device, q.dtype)
    scores = q @ k.transpose(2, 3) * 0.4 + mask[:, None]
    assert relative_error(largest_logits(q, k, mask, 0.4), scores.amax((0, 2, 3))) < 1e-6


def logits_of(model, tokens) -> list[torch.Tensor]:
    for layer in (m for m in model.modules() if isinstance(m, LatentAttention)):
        layer.max_logit_H = torch.zeros(layer.config.num_attention_heads)
    model.hidden(tokens)
    return [m.max_logit_H for m in model.modules() if isinstance(m, LatentAttention)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", SHAPES)
def test_heads_above_tau_come_down_to_it_and_the_others_stay(changes, dtype):
    model = tiny_model(**changes)
    optimizer = Optimizer(model, Optim(), dtype)
    tokens = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    first = logits_of(model, tokens)[0]
    tau = float(first.sort().values[-2:].mean())  # one head of the first layer is above it
    clipping = QKClip(model, optimizer, tau)
    clipping.watch()
    model.hidden(tokens)
    before = {n: m.detach().clone() for n, m in optimizer.masters.items()}
    assert clipping.clip() >= float(first.max()) * 0.999
    after = logits_of(model, tokens)[0]
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert float(after.max()) <= tau * (1 + tolerance)
    held = first <= tau
    assert torch.allclose(after[held], first[held], rtol=tolerance)
    changed = {n.rsplit(".", 2)[1] for n, m in optimizer.masters.items() if not torch.equal(m, before[n])}
    assert changed == {"kv_b_proj", "qkv_a_proj" if model.config.q_lora_rank is None else "q_b_proj"}
    assert all(torch.equal(p.float(), optimizer.masters[n].to(p.dtype).float()) for n, p in model.named_parameters())
    c = model.config  # the latent and the rotary key are everybody's: untouched
    if c.q_lora_rank is None:
        name = "model.layers.0.self_attn.qkv_a_proj.weight"
        own = c.num_attention_heads * c.qk_head_dim
        assert torch.equal(optimizer.masters[name][own:], before[name][own:])


@torch.no_grad()
def test_inference_is_not_watched():
    model = tiny_model()
    assert not any(peak.any() for peak in logits_of(model, torch.zeros(1, 8, dtype=torch.long)))


class Crash(Exception):
    pass


def crash(step, _):
    if step == 17:
        raise Crash


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_in_a_run_it_holds_the_logits_and_resumes_exactly(kind, tmp_path):
    settings = dict(optimizer=kind, qk_clip=0.5, lr=0.03, save_every=5)
    trainer(tmp_path / "straight", **settings).run(loader(), 30, quiet=True)
    trainer(tmp_path / "free", **{**settings, "qk_clip": 1e9}).run(loader(), 30, quiet=True)
    held, free = (max(row["max_logit"] for row in rows(tmp_path / name)[10:]) for name in ("straight", "free"))
    assert free > 1.5 * held
    with pytest.raises(Crash):
        trainer(tmp_path / "stopped", **settings).run(Watched(crash), 30, quiet=True)
    trainer(tmp_path / "stopped", 5, **settings).run(loader(), 30, quiet=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight") != weights(tmp_path / "free")
