"""Weights and masks for what another policy or another engine sampled, against the papers' formulas written out in numpy.

TRL has them too (importance sampling correction, off-policy mask), but is not among the tests' packages.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from pascaline.data.batch import Batch, Sample, batches
from pascaline.model.transformer import Model
from pascaline.post.moment import Moment
from pascaline.tables import Rl
from pascaline.train.losses import Loss, compute, totals
from pascaline.train.metrics import combined
from pascaline.train.policy import Policy, corrected, fresh

LENGTHS, ADVANTAGES = (3, 5, 1, 4), (1.0, -0.7, 0.4, -1.3)


@settings(max_examples=200, deadline=None)
@given(st.floats(-4, 4), st.sampled_from([0.0, 1.5, 2.0, 5.0]), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 2.0, 5.0]))
def test_the_weight_of_a_token_of_another_engine(gap: float, cap: float, low: float, high: float) -> None:
    """TIS min(w, C); MIS and IcePop: 0 outside [low, high]."""
    found = corrected(torch.tensor([gap - 2.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64), cap, low, high)
    w = np.exp(gap - 2.0 + 2.0)
    expected = min(w, cap) if cap else 1.0
    if w < low or (high and w > high):
        expected = 0.0
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_absurd_gaps_give_finite_weights() -> None:
    assert corrected(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), 2.0, 0.0, 0.0).tolist() == pytest.approx([2.0, 0.0], abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_bad_answers_that_have_become_improbable_are_masked(seed: int) -> None:
    """V3.2: 0 where A < 0 and mean_t(log pi_sampler - log pi) > delta, for the whole answer."""
    draw, delta = np.random.default_rng(seed), 0.2
    gaps = [draw.normal(scale=0.5, size=n) for n in LENGTHS]
    expected = [float(not (a < 0 and -g.mean() > delta)) for g, a in zip(gaps, ADVANTAGES, strict=True)]
    answer = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
    advantage = torch.tensor([a for a, n in zip(ADVANTAGES, LENGTHS, strict=True) for _ in range(n)])
    found = fresh(torch.from_numpy(np.concatenate(gaps)), advantage, answer, torch.ones(len(answer)), delta)
    assert found.tolist() == [e for e, n in zip(expected, LENGTHS, strict=True) for _ in range(n)]


def test_a_good_answer_is_never_stale_and_delta_is_the_border() -> None:
    gap, answer, ones = torch.tensor([-0.5, -0.7]), torch.zeros(2, dtype=torch.long), torch.ones(2)  # mean distance 0.6
    assert fresh(gap, ones, answer, ones, 0.1).tolist() == [1, 1]
    assert fresh(gap, -ones, answer, ones, 0.59).tolist() == [0, 0] and fresh(gap, -ones, answer, ones, 0.61).tolist() == [1, 1]
    assert fresh(-gap, -ones, answer, ones, 0.1).tolist() == [1, 1]  # more probable than it was: still to be unlearnt


# ---- through the model


def rollout(model: Model, seed: int = 0, far: float = 0.4, row: int = 16) -> list[Batch]:
    """Answers with prompts of 2 tokens; the engine that sampled them says log-probabilities of its own."""
    draw, samples = np.random.default_rng(seed), []
    for n, a in zip(LENGTHS, ADVANTAGES, strict=True):
        tokens = draw.integers(3, 61, size=n + 2)
        with torch.no_grad():
            own = model(torch.from_numpy(tokens)[None])[0, 1:-1].log_softmax(-1).gather(1, torch.from_numpy(tokens[2:, None]))[:, 0]
        engine = own.numpy() + far * draw.normal(size=n)
        streams = {"rl": np.ones(n), "advantage": np.full(n, a), "old_logprob": engine}
        samples.append(Sample(tokens, {name: np.r_[0, 0, s].astype(np.float32) for name, s in streams.items()}))
    return batches(samples, row, 1, 0)


def each(model: Model, found: list[Batch]) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """(log pi, log pi_sampler, advantage) of each answer, from logits of its own, answer by answer."""
    out = []
    for batch in found:
        for row in range(len(batch.tokens)):
            for d in range(int(batch.document_ids[row].max()) + 1):
                at = batch.document_ids[row] == d
                ids, sampled = batch.tokens[row][at], batch.streams["rl"][row][at] > 0
                with torch.no_grad():
                    logprob = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                kept = sampled[1:]
                old, advantage = (batch.streams[name][row][at][1:][kept].numpy() for name in ("old_logprob", "advantage"))
                out.append((logprob[kept].numpy(), old, float(advantage[0])))
    return out


def total_loss(model: Model, found: list[Batch], rule: Loss) -> tuple[float, dict[str, float]]:
    total, loss, logs = totals(found), 0.0, dict[str, torch.Tensor]()
    for batch in found:
        part, told, _ = compute(model, batch, total, rule)
        loss += part.item()
        for name, value in told.items():
            logs[name] = combined(name, logs[name], value) if name in logs else value
    return loss, {name: value.tolist() for name, value in logs.items()}


def moved(model: Model, seed: int = 1) -> Model:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize(("tis", "low", "high"), [(1.3, 0.0, 0.0), (1.5, 0.7, 1.5), (0.0, 0.8, 1.2)])
def test_the_loss_of_another_engines_rollout(tis: float, low: float, high: float) -> None:
    """-min(w, C) min(r A, clip(r) A), r to the trainer's own log-probabilities of the rollout's moment (with tis; else to the engine's)."""
    model = tiny_model()
    before = rollout(model)
    then = each(model, before)
    moment = Moment(model, Rl(tis=tis, mask_low=low, mask_high=high))
    found = moment.seen(before)
    now = each(moved(model), before)
    terms, weights = [], []
    for (own, engine, a), (logprob, _, _) in zip(then, now, strict=True):
        w = np.exp(own - engine)
        kept = (w >= low) & ((w <= high) if high else True)
        weight = (np.minimum(w, tis) if tis else 1.0) * kept
        r = np.exp(logprob - (own if tis else engine))
        terms.append(-weight * np.minimum(r * a, r.clip(0.8, 1.28) * a))
        weights.append(weight)
    loss, logs = total_loss(model, found, Loss())
    flat = np.concatenate(weights)
    assert loss == pytest.approx(np.concatenate(terms).mean(), abs=1e-5)
    assert moment.facts["tis_weight"] == pytest.approx(flat.mean(), abs=1e-5)
    assert moment.facts["masked"] == pytest.approx((flat == 0).mean()) and (not low or 0 < moment.facts["masked"] < 1)
    assert moment.facts["engine_gap"] == pytest.approx(max(np.abs(o - e).max() for o, e, _ in then), abs=1e-5)
    ratios = np.concatenate([np.exp(n[0] - (t[0] if tis else t[1])) for n, t in zip(now, then, strict=True)])
    assert logs["ratio"] == pytest.approx(ratios.mean(), abs=1e-5) and logs["ratio_max"] == pytest.approx(ratios.max(), abs=1e-4)
    gap = np.concatenate([np.abs(n[0] - t[1]) for n, t in zip(now, then, strict=True)])
    assert logs["mismatch"] == pytest.approx(gap.mean(), abs=1e-5)  # to the engine's, whatever the ratio is to


@pytest.mark.parametrize("tis", [0.0, 1.5])
def test_the_stale_mask_looks_at_the_sampler(tis: float) -> None:
    """delta lies between what the trainer's own log-probabilities of that moment and the engine's say of the last answer."""
    model = tiny_model()
    before = rollout(model)
    then = each(model, before)
    found = Moment(model, Rl(tis=tis)).seen(before) if tis else before
    now = each(moved(model, 4), before)
    last = [round(a, 1) for _, _, a in then].index(-1.3)
    by_own, by_engine = ((then[last][i] - now[last][0]).mean() for i in (0, 1))
    delta = float(by_own + by_engine) / 2
    assert by_own < delta < by_engine
    terms, stale = [], []
    for (own, engine, a), (logprob, _, _) in zip(then, now, strict=True):
        r, masked = np.exp(logprob - (own if tis else engine)), a < 0 and (engine - logprob).mean() > delta
        weight = np.minimum(np.exp(own - engine), tis) if tis else 1.0
        terms.append(-weight * np.minimum(r * a, r.clip(0.8, 1.28) * a) * (not masked))
        stale.append(np.full(len(r), float(masked)))
    loss, logs = total_loss(model, found, Loss(policy=Policy(stale=delta)))
    assert 0 < np.concatenate(stale).mean() < 1
    assert loss == pytest.approx(np.concatenate(terms).mean(), abs=1e-5)
    assert logs["stale"] == pytest.approx(np.concatenate(stale).mean(), abs=1e-6)
    assert "stale" not in total_loss(model, found, Loss())[1]


def test_a_stale_answer_has_no_gradient() -> None:
    model = tiny_model()
    (batch,) = [replace(b) for b in rollout(model, far=0.0, row=64)]
    batch.streams["old_logprob"] = batch.streams["old_logprob"] + batch.streams["rl"]  # every answer is e times less probable now
    loss, logs, _ = compute(model, batch, totals([batch]), Loss(policy=Policy(stale=0.5)))
    loss.backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    batch.streams["advantage"] = batch.streams["advantage"].clamp(min=0)
    compute(model, batch, totals([batch]), Loss())[0].backward()
    for one, other in zip(gradient, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert torch.allclose(one, other, atol=1e-7)
    assert logs["stale"] == pytest.approx(9 / 13)


def test_the_largest_ratio_is_of_all_micro_batches() -> None:
    one, other = torch.tensor(1.5), torch.tensor(0.7)
    assert combined("ratio_max", one, other) == 1.5 == combined("ratio_max", other, one) and combined("ratio", one, other) == pytest.approx(
        2.2
    )
    model = tiny_model()
    found = rollout(model)
    assert len(found) > 1
    expected = max(np.exp(now - old).max() for now, old, _ in each(model, found))
    assert total_loss(model, found, Loss())[1]["ratio_max"] == pytest.approx(expected, rel=1e-5)


def test_a_micro_batch_without_sampled_tokens_has_no_largest_ratio() -> None:
    model = tiny_model()
    found = rollout(model)
    total = totals(found)
    found[0].streams["rl"].zero_()
    assert compute(model, found[0], total, Loss())[1]["ratio_max"] == 0
