"""Sampling: the right frequencies, the right nucleus, numbers that depend on (seed, position) alone."""

import math

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pascaline.engine.sampler import HEAD, Sampling, _mix, exponentials, mix, sample
from pascaline.errors import BadInput

DRAWS = 20_000


def logits(vocab: int, seed: int = 0, spread: float = 1.5) -> torch.Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def draw(row: torch.Tensor, temperature: float, top_p: float, count: int = DRAWS, seed: int = 0, **cuts):
    """`count` independent samples of one distribution, through the function that the engine calls."""
    settings_n = [Sampling(temperature, top_p, **cuts)] * count
    return sample(row.expand(count, -1), settings_n, np.arange(count) + 1_000_000 * seed, np.zeros(count, np.int64))


def chi_square(token: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean (Wilson-Hilferty); cells expecting < 5 are pooled."""
    count = torch.bincount(token, minlength=len(p)).double()
    expected = p.double() * len(token)
    small = expected < 5
    count = torch.cat((count[~small], count[small].sum()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    keep = expected > 0
    k = int(keep.sum()) - 1
    statistic = float(((count[keep] - expected[keep]) ** 2 / expected[keep]).sum())
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of most probable tokens whose probability is at least top_p, renormalised (arXiv 1904.09751)."""
    order = p.argsort(descending=True)
    size = int((p[order].double().cumsum(0) < top_p).sum()) + 1
    kept = torch.zeros_like(p)
    kept[order[:size]] = p[order[:size]]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocab", [5, 61, 300])
def test_frequencies_are_the_softmax(temperature, vocab):
    row = logits(vocab, seed=vocab)
    token = draw(row, temperature, 1.0, seed=vocab)
    assert abs(chi_square(token, (row / temperature).softmax(-1))) < 4
    assert chi_square(token, (row / (temperature * 1.5)).softmax(-1)) > 8  # the test can tell


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocab, spread", [(61, 1.5), (300, 1.5), (300, 0.01)])
def test_top_p_keeps_the_nucleus_and_its_frequencies(top_p, vocab, spread):
    """spread 0.01 needs far more than HEAD tokens, 1.5 fewer."""
    row = logits(vocab, seed=3, spread=spread)
    p = (row / 0.8).softmax(-1)
    expected = nucleus(p, top_p)
    token = draw(row, 0.8, top_p)
    assert expected[token].gt(0).all()
    if (expected > 0).sum() > 1:
        assert abs(chi_square(token, expected)) < 4


def test_the_nucleus_may_be_larger_than_the_partial_sort():
    assert (nucleus(logits(300, 3, 0.01).softmax(-1), 0.9) > 0).sum() > HEAD


@pytest.mark.parametrize("top_k, min_p, top_p", [(5, 0.0, 1.0), (0, 0.2, 1.0), (20, 0.05, 0.9), (100, 0.0, 0.8), (1, 0.0, 1.0)])
@pytest.mark.parametrize("spread", [1.5, 0.01])
def test_cuts_in_their_order(top_k, min_p, top_p, spread):
    """top_k, then top_p of what is left, and min_p; as transformers' warpers do."""
    row = logits(300, seed=5, spread=spread)
    warpers = [TemperatureLogitsWarper(0.8)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores = row[None].clone()
    for warper in warpers:
        scores = warper(None, scores)
    expected = scores[0].softmax(-1)
    token = draw(row, 0.8, top_p, top_k=top_k, min_p=min_p)
    assert expected[token].gt(0).all()
    if (expected > 0).sum() > 1:
        assert abs(chi_square(token, expected)) < 4


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-30, 1e-44])
def test_cold_is_greedy(temperature):
    row = logits(61)
    assert (draw(row, temperature, 1.0, 50) == row.argmax()).all()


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_hot_is_uniform(top_p):
    token = draw(logits(61), 1e30, top_p)
    assert len(set(token.tolist())) == (61 if top_p == 1 else 31)


def test_rows_are_independent_of_their_neighbours():
    """Mixed temperatures and nuclei in one call give each row what it gets alone."""
    n = 64
    rows = torch.stack([logits(300, i, spread=0.01 if i % 5 == 0 else 1.5) for i in range(n)])
    kinds = [(0.0, 0.3), (0.5, 0.95), (1.0, 1.0), (2.0, 1.0), (1.0, 0.3)]
    settings_n = [Sampling(*kinds[i % 5], top_k=i % 3 * 40, min_p=0.01 * (i % 2)) for i in range(n)]
    token = sample(rows, settings_n, np.arange(n), np.arange(n))
    for i in range(n):
        assert sample(rows[i : i + 1], settings_n[i : i + 1], np.array([i]), np.array([i])).item() == token[i]


def test_impossible_tokens_are_never_sampled():
    row = logits(61)
    row[[0, 7, 60]] = -torch.inf
    assert not {0, 7, 60} & set(draw(row, 1.7, 1.0).tolist())


def test_rounding_seldom_changes_a_draw():
    """What another shape of matmul does to logits, 1e-5 here and so tenfold, must not change answers; however large the vocabulary."""
    rows = torch.stack([logits(5000, i, spread=0.3) for i in range(400)])
    moved = rows + 1e-5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    found = [sample(r, [Sampling(1.0, 1.0)] * 400, np.arange(400), np.zeros(400)) for r in (rows, moved)]
    assert (found[0] != found[1]).sum() <= 1


def test_alike_distributions_draw_the_same_token():
    """Speculation lives on it: two distributions p and q agree at least in (1 - d) / (1 + d) of the draws, d their total variation."""
    p, q = logits(300, 1), logits(300, 1) + 0.3 * logits(300, 2, 1.0)
    d = float((p.softmax(-1) - q.softmax(-1)).abs().sum() / 2)
    same = (draw(p, 1.0, 1.0) == draw(q, 1.0, 1.0)).float().mean()
    assert 0.05 < d < 0.3 and same >= (1 - d) / (1 + d) - 0.02


# ---- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["key", "token"])
def test_numbers_are_exponential_and_independent(by):
    n = np.arange(100_000)
    keys = torch.from_numpy(mix(n.astype(np.uint64)).view(np.int64))
    if by == "key":
        e = exponentials(keys, torch.full((len(n), 1), 77))[:, 0]
    else:
        e = exponentials(keys[5:6], torch.arange(len(n))[None])[0]
    u = (-e.double()).exp().numpy()
    assert e.min() > 0 and e.isfinite().all()
    expected = len(n) / 100
    statistic = ((np.bincount((u * 100).astype(int).clip(0, 99), minlength=100) - expected) ** 2 / expected).sum()
    assert 50 < statistic < 160  # chi-square with 99 degrees of freedom, 4 standard deviations
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 0.015


def test_the_hash_is_splitmix64_on_tensors_too():
    x = mix(np.arange(1000, dtype=np.uint64))
    assert (_mix(torch.from_numpy(x.view(np.int64).copy())).numpy() == mix(x).view(np.int64)).all()


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.01), ("top_p", -1),
     ("top_p", float("nan")), ("max_tokens", 0), ("top_k", -1), ("min_p", 1.5), ("presence_penalty", 2.1), ("frequency_penalty", -3),
     ("repetition_penalty", 0.0), ("min_tokens", -1), ("stop", ("",)), ("logit_bias", ((3, 101.0),)), ("logit_bias", ((-1, 1.0),)),
     ("top_logprobs", -1), ("max_thinking_tokens", -1), ("n", 0), ("n", -2), ("seed", -1), ("seed", 2**64)],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(BadInput, match=f"{field} = "):
        Sampling(**{field: value})


def test_the_last_possible_settings_are_possible():
    Sampling(max_tokens=0, prompt_logprobs=True)
    Sampling(temperature=0, top_p=1.0, max_tokens=1, n=1, seed=2**64 - 1)
    Sampling(top_p=1e-9)
