"""Sampling: the right frequencies, the right nucleus, numbers that depend on (seed, position) alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.engine.sampler import HEAD, Sampling, sample, uniforms
from pascaline.errors import BadInput

DRAWS = 20_000


def logits(vocab: int, seed: int = 0, spread: float = 1.5) -> torch.Tensor:
    return spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def draw(row: torch.Tensor, temperature: float, top_p: float, count: int = DRAWS, seed: int = 0):
    """`count` independent samples of one distribution, through the function that the engine calls."""
    uniform = uniforms(np.arange(count) + 1_000_000 * seed, np.zeros(count, np.int64))
    return sample(row.expand(count, -1), np.full(count, temperature, np.float32), np.full(count, top_p, np.float32), uniform)


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
    token, _ = draw(row, temperature, 1.0, seed=vocab)
    assert abs(chi_square(token, (row / temperature).softmax(-1))) < 4
    assert chi_square(token, (row / (temperature * 1.5)).softmax(-1)) > 8  # the test can tell


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocab, spread", [(61, 1.5), (300, 1.5), (300, 0.01)])
def test_top_p_keeps_the_nucleus_and_its_frequencies(top_p, vocab, spread):
    """spread 0.01 needs far more than HEAD tokens, 1.5 fewer."""
    row = logits(vocab, seed=3, spread=spread)
    p = (row / 0.8).softmax(-1)
    expected = nucleus(p, top_p)
    token, _ = draw(row, 0.8, top_p)
    assert expected[token].gt(0).all()
    if (expected > 0).sum() > 1:
        assert abs(chi_square(token, expected)) < 4


def test_the_nucleus_may_be_larger_than_the_partial_sort():
    assert (nucleus(logits(300, 3, 0.01).softmax(-1), 0.9) > 0).sum() > HEAD


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.floats(0.01, 1.0), st.floats(0.05, 3.0), st.integers(0, 1000))
def test_the_logprob_is_the_models_own(vocab, top_p, temperature, seed):
    """Temperature 1 and nothing cut off, whatever the sampling: it is the policy that learns, not the sampler."""
    row = logits(vocab, seed)
    token, logprob = draw(row, temperature, top_p, 20, seed)
    assert torch.allclose(logprob, row.log_softmax(-1)[token], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-30, 1e-44])
def test_cold_is_greedy(temperature):
    row = logits(61)
    token, logprob = draw(row, temperature, 1.0, 50)
    assert (token == row.argmax()).all() and logprob.isfinite().all()


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_hot_is_uniform(top_p):
    token, _ = draw(logits(61), 1e30, top_p)
    assert len(set(token.tolist())) == (61 if top_p == 1 else 31)


def test_rows_are_independent_of_their_neighbours():
    """Mixed temperatures and nuclei in one call give each row what it gets alone."""
    n = 64
    rows = torch.stack([logits(300, i, spread=0.01 if i % 5 == 0 else 1.5) for i in range(n)])
    temperature = np.tile(np.array([0.0, 0.5, 1.0, 2.0], np.float32), n // 4)
    top_p = np.tile(np.array([0.3, 0.95, 1.0], np.float32), n)[:n]
    uniform = uniforms(np.arange(n), np.arange(n))
    token, logprob = sample(rows, temperature, top_p, uniform)
    for i in range(n):
        alone = sample(rows[i : i + 1], temperature[i : i + 1], top_p[i : i + 1], uniform[i : i + 1])
        assert alone[0].item() == token[i] and alone[1].item() == pytest.approx(float(logprob[i]), abs=1e-6)


def test_impossible_tokens_are_never_sampled():
    row = logits(61)
    row[[0, 7, 60]] = -torch.inf
    token, logprob = draw(row, 1.7, 1.0)
    assert not {0, 7, 60} & set(token.tolist()) and logprob.isfinite().all()


@pytest.mark.parametrize("end", [0.0, 1.0 - 2.0**-54, 1.0])
def test_the_ends_of_the_unit_interval_are_tokens(end):
    row = logits(61)
    for top_p in (0.9, 1.0):
        token, logprob = sample(row[None], np.ones(1), np.full(1, top_p), np.array([end]))
        assert 0 <= int(token) < 61 and logprob.isfinite().all()


# ---- the generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["position", "seed"])
def test_numbers_are_uniform_and_independent(by):
    n = np.arange(100_000)
    u = uniforms(np.full_like(n, 12345), n) if by == "position" else uniforms(n, np.full_like(n, 7))
    assert u.min() > 0 and u.max() < 1
    expected = len(n) / 100
    statistic = ((np.bincount((u * 100).astype(int), minlength=100) - expected) ** 2 / expected).sum()
    assert 50 < statistic < 160  # chi-square with 99 degrees of freedom, 4 standard deviations
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 0.015


def test_numbers_depend_on_seed_and_position_alone():
    seeds, positions = np.array([5, 2**62, 0, 5]), np.array([0, 3, 9, 1])
    together = uniforms(seeds, positions)
    assert together.tolist() == [float(uniforms(seeds[i : i + 1], positions[i : i + 1])[0]) for i in range(4)]
    assert len(set(together.tolist())) == 4


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.01), ("top_p", -1),
     ("top_p", float("nan")), ("max_tokens", 0), ("n", 0), ("n", -2), ("seed", -1), ("seed", 2**64)],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(BadInput, match=f"{field} = "):
        Sampling(**{field: value})


def test_the_last_possible_settings_are_possible():
    Sampling(temperature=0, top_p=1.0, max_tokens=1, n=1, seed=2**64 - 1)
    Sampling(top_p=1e-9)
