"""A teacher's k most probable tokens as a target: the KL over them and the rest, against formulas written out here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import relative_error, tiny_model

from pascaline.data.batch import Batch, Sample, collate
from pascaline.train import losses
from pascaline.train.losses import Loss, compute, soft_loss, top_logprobs, totals

V, D, M = 61, 24, 20


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher(k: int, sharp: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its whole log-probabilities [m, V], and of the k most probable tokens ids and log-probabilities [m, k]."""
    whole = (sharp * F.linear(randn(M, D, seed=5), randn(V, D, seed=6))).log_softmax(-1)
    values, ids = whole.topk(k)
    return whole, ids, values


def merged(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """The same KL with one row of logits a time, the rest as a sum over a mask, in float64."""
    found = []
    for row, own, log_p in zip(logits.double(), ids, logprobs.double(), strict=True):
        q = row.softmax(0)
        outside = torch.ones(V, dtype=torch.bool)
        outside[own] = False
        p = torch.cat([log_p.exp(), (1 - log_p.exp().sum()).clamp(min=0)[None]])
        buckets = torch.cat([q[own], q[outside].sum()[None]])
        found.append(sum(a * (a / b).log() for a, b in zip(p, buckets, strict=True) if a > 0))
    return torch.stack(found)


def with_gradients(function) -> list[torch.Tensor]:
    hidden, weight = randn(M, D).requires_grad_(), randn(V, D, seed=2).requires_grad_()
    loss = function(hidden, weight)
    (loss * randn(M, seed=3)).sum().backward()
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("chunk", [3, 512])
def test_with_all_tokens_it_is_the_whole_kl(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    whole, ids, logprobs = teacher(V)
    ours = with_gradients(lambda h, w: soft_loss(h, w, ids, logprobs))
    log_q = lambda h, w: F.linear(h, w).log_softmax(-1)  # noqa: E731
    theirs = with_gradients(lambda h, w: F.kl_div(log_q(h, w), whole, reduction="none", log_target=True).sum(-1))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("k, sharp", [(1, 1.0), (5, 1.0), (5, 0.1), (60, 0.2)])
@pytest.mark.parametrize("chunk", [7, 512])
def test_with_some_the_others_are_one_more_outcome(k, sharp, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    whole, ids, logprobs = teacher(k, sharp)
    ours = with_gradients(lambda h, w: soft_loss(h, w, ids, logprobs))
    theirs = with_gradients(lambda h, w: merged(F.linear(h, w), ids, logprobs).float())
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-4
    complete = F.kl_div(F.linear(randn(M, D), randn(V, D, seed=2)).log_softmax(-1), whole, reduction="none", log_target=True).sum(-1)
    assert (ours[0] > -1e-5).all() and (ours[0] < complete + 1e-4).all()  # merging outcomes never adds


def learnt(loss) -> torch.Tensor:
    """The distribution [V] that a free row of logits ends at."""
    logits = torch.zeros(1, V, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(-1)[0]


def test_the_student_ends_at_the_teachers_own_probabilities_and_not_at_inflated_ones():
    """What is wrong with dropping the rest: the same 5 tokens, scaled up to sum to 1 (arXiv 2503.16870)."""
    _, ids, logprobs = (t[:1] for t in teacher(5, sharp=0.3))
    own = learnt(lambda logits: soft_loss(logits, torch.eye(V), ids, logprobs).sum())
    assert own[ids[0]] == pytest.approx(logprobs.exp()[0], abs=2e-3)
    naive = learnt(lambda logits: -(logprobs.exp() * logits.log_softmax(-1).gather(1, ids)).sum())
    assert naive[ids[0]].sum() > 0.99 and logprobs.exp().sum() < 0.8


@pytest.mark.parametrize("k", [3, V])
def test_a_student_that_is_sure_of_something_else_still_gets_finite_gradients(k):
    _, ids, logprobs = teacher(k)
    for scale in (30.0, 1e4):
        hidden = (scale * randn(M, D)).requires_grad_()
        soft_loss(hidden, randn(V, D, seed=2), ids, logprobs).sum().backward()
        assert hidden.grad.isfinite().all()
    sure = torch.full((M, V), -200.0).scatter_(1, ids[:, :1], 200.0).requires_grad_()
    loss = soft_loss(sure, torch.eye(V), ids, logprobs)
    loss.sum().backward()
    assert loss.isfinite().all() and sure.grad.isfinite().all()


def test_in_bf16_it_is_float32_and_near():
    _, ids, logprobs = teacher(5)
    hidden, weight = randn(M, D).bfloat16().requires_grad_(), randn(V, D, seed=2).bfloat16().requires_grad_()
    loss = soft_loss(hidden, weight, ids, logprobs)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    soft_loss(*exact, ids, logprobs).sum().backward()
    assert relative_error(hidden.grad.float(), exact[0].grad) < 2e-2 and relative_error(weight.grad.float(), exact[1].grad) < 2e-2


@pytest.mark.parametrize("chunk", [3, 512])
def test_the_most_probable_tokens_are_of_the_ids_allowed_and_their_probability_of_all(chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    hidden, weight = randn(M, D), randn(V, D, seed=2)
    ids, logprobs = top_logprobs(hidden, weight, 4, below=50)
    whole = F.linear(hidden, weight).log_softmax(-1)
    values, expected = whole[:, :50].topk(4)
    assert torch.equal(ids, expected) and relative_error(logprobs, values) < 1e-5
    assert (top_logprobs(hidden, weight, 4, below=V)[0] >= 50).any()


# ---- through a model -------------------------------------------------------------------------------------------------


def soft_sample(length: int, seed: int, k: int = 4, **more: float) -> Sample:
    draw = np.random.default_rng(seed)
    logprobs = np.log(draw.dirichlet(np.ones(k + 3), length)[:, :k])
    ids = np.stack([draw.permutation(61)[:k] for _ in range(length)])
    weight = (draw.random(length) < 0.6) * draw.uniform(0.5, 2, length)
    streams = {"soft": weight, "top_ids": ids, "top_logprobs": logprobs, **{name: np.full(length, v) for name, v in more.items()}}
    return Sample(draw.integers(3, 61, length), {name: stream.astype(np.float32) for name, stream in streams.items()})


def gradients(model, parts: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = totals(parts)
    value = 0.0
    for batch in parts:
        loss, _, _ = compute(model, batch, total, Loss())
        loss.backward()
        value += loss.item()
    return value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_loss_of_a_step_is_the_weighted_mean_over_all_its_micro_batches():
    """Law 3: normalised by the whole step's weight, wherever the micro-batches are cut; beside `ce` each by its own."""
    model = tiny_model()
    rows = [[soft_sample(7, 0), soft_sample(5, 1)], [soft_sample(9, 2)], [soft_sample(3, 3, ce=0.7)]]
    one, cut = collate(rows, 16, 0), [collate(rows[:1], 16, 0), collate(rows[1:], 16, 0)]
    value, grads = gradients(model, [one])
    again, same = gradients(model, cut)
    assert again == pytest.approx(value, abs=1e-5) and grads.keys() == same.keys()
    assert all((grads[n] - same[n]).abs().max() < 1e-5 * (1 + grads[n].abs().max()) for n in grads)

    soft = plain = soft_weight = plain_weight = 0.0
    for sample in (s for row in rows for s in row):
        logits = model(torch.from_numpy(sample.tokens)[None])[0, :-1].detach()
        own = {name: torch.from_numpy(stream[1:]) for name, stream in sample.streams.items()}
        soft += float((own["soft"] * merged(logits, own["top_ids"].long(), own["top_logprobs"])).sum())
        soft_weight += float(own["soft"].sum())
        ce = own.get("ce", torch.zeros(len(logits)))
        plain += float((ce * F.cross_entropy(logits, torch.from_numpy(sample.tokens[1:]), reduction="none")).sum())
        plain_weight += float(ce.sum())
    assert value == pytest.approx(soft / soft_weight + plain / plain_weight, abs=1e-4)


def test_tokens_without_weight_have_no_say_and_the_target_is_not_the_token_itself():
    model = tiny_model()
    sample = soft_sample(9, 0)
    value, _ = gradients(model, [collate([[sample]], 9, 0)])
    off = sample.streams["soft"] == 0
    assert off.sum() > 1
    other = {name: stream.copy() for name, stream in sample.streams.items()}
    other["top_logprobs"][off] -= 1.0
    assert gradients(model, [collate([[Sample(sample.tokens, other)]], 9, 0)])[0] == value
    tokens = sample.tokens.copy()
    tokens[-1] = (tokens[-1] + 1) % 61  # nothing follows it
    assert gradients(model, [collate([[Sample(tokens, sample.streams)]], 9, 0)])[0] == pytest.approx(value, abs=1e-6)


def test_the_mtp_modules_learn_the_written_tokens():
    model = tiny_model(num_nextn_predict_layers=1)
    batch = collate([[soft_sample(9, 0)]], 9, 0)
    loss, parts, _ = compute(model, batch, totals([batch]), Loss(mtp=0.3))
    loss.backward()
    assert parts["mtp"] > 0 and "soft" in parts and all(p.grad is not None for n, p in model.named_parameters() if "layers.2.eh_proj" in n)
