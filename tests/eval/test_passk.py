import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascaline.errors import BadInput
from pascaline.eval import passk
from pascaline.eval.passk import best_by_problem, majority, majority_by_problem, mean_interval, paired_difference, pass_at_k


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_shapes_and_limits() -> None:
    assert pass_at_k([4, 8], [[0, 8], [1, 4]], 2).tolist() == pytest.approx(np.array([[0, 1], [0.5, 1 - 6 / 28]]))
    assert pass_at_k(8, [0, 3, 8], 1).tolist() == pytest.approx([0, 3 / 8, 1])
    assert pass_at_k(10_000, 1, 5000) == pytest.approx(0.5)  # the binomials alone overflow a float
    for n, c, k in ((4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(BadInput):
            pass_at_k([n, 9], [c, 1], k)


def brute_vote(answers: list[str | None], right: list[bool], k: int) -> Fraction:
    verdict = {a: r for a, r in zip(answers, right, strict=True) if a is not None}
    credit = Fraction(0)
    for subset in combinations(answers, k):
        votes = Counter(a for a in subset if a is not None)
        if votes:
            top = [a for a in votes if votes[a] == max(votes.values())]
            credit += Fraction(sum(verdict[a] for a in top), len(top))
    return credit / math.comb(len(answers), k)


@given(
    answers=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8),
    good=st.sets(st.sampled_from("abcd")),
    data=st.data(),
)
def test_majority_is_the_mean_over_all_subsets(answers: list[str | None], good: set[str], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    right = [a in good for a in answers]
    assert majority([answers], [right], k) == pytest.approx(float(brute_vote(answers, right, k)), abs=1e-6)


def test_majority_sampled_agrees_with_exact_and_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    answers = [[str(x) if x else None for x in rng.integers(0, 4, 16)] for _ in range(40)]
    right = [[a == "1" for a in row] for row in answers]
    exact = majority_by_problem(answers, right, 4)
    monkeypatch.setattr(passk, "EXACT_SUBSETS", 100)
    sampled = majority_by_problem(answers, right, 4, seed=1)
    assert not np.array_equal(exact, sampled)
    assert np.abs(exact - sampled).max() < 5 * 0.5 / math.sqrt(passk.SAMPLED_SUBSETS)
    assert abs(exact.mean() - sampled.mean()) < 0.015
    assert np.array_equal(sampled, majority_by_problem(answers, right, 4, seed=1))
    assert not np.array_equal(sampled, majority_by_problem(answers, right, 4, seed=2))


def test_majority_known_cases() -> None:
    assert majority([["a", "a", "b"], ["b", "b", "a"]], [[True, True, False], [False, False, True]], 3) == 0.5
    assert majority([["a", "b"]], [[True, False]], 2) == 0.5  # a tie, by lot
    assert majority([["a", None, None]], [[True, False, False]], 3) == 1.0  # abstentions do not vote
    assert majority([[None, None]], [[False, False]], 1) == 0.0
    assert majority([["a"] * 32], [[True] * 32], 32) == 1.0
    with pytest.raises(BadInput, match="among 3"):
        majority([["a", "b"]], [[True, False]], 3)
    with pytest.raises(BadInput):
        majority([], [], 1)


def test_interval_covers_the_truth_when_samples_of_a_problem_go_together() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        means = rng.binomial(4, rng.beta(0.5, 0.5, 200)) / 4  # truth: 0.5
        _, low, high = mean_interval(means)
        hits += low <= 0.5 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_interval_edges() -> None:
    assert mean_interval([0.0] * 20) == pytest.approx((0, 0, 0.1611), abs=1e-4)  # Wilson's published example range
    assert mean_interval([1.0] * 20) == pytest.approx((1, 0.8389, 1), abs=1e-4)
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5 and low < 0.1 and high > 0.9
    assert mean_interval([0, 1]) == (0.5, 0.0, 1.0)
    with pytest.raises(BadInput):
        mean_interval([])


def test_paired_difference() -> None:
    rng = np.random.default_rng(4)
    hardness = rng.random(1000)
    before, after = (rng.random(1000) < hardness * 0.8), (rng.random(1000) < hardness * 0.8 + 0.15)
    gain, low, high = paired_difference(after, before)
    assert gain == pytest.approx(after.mean() - before.mean()) and low < 0.15 < high and gain > 0
    assert paired_difference(before, after) == pytest.approx((-gain, -high, -low))
    same, low, high = paired_difference([1.0] * 50, [1.0] * 50)
    assert same == 0 and -0.1 < low < 0 < high < 0.1
    assert paired_difference([1.0], [0.0])[1] < 0.5
    with pytest.raises(BadInput):
        paired_difference([1.0], [1.0, 0.0])


@given(
    scores=st.lists(st.sampled_from([-math.inf, 0.0, 0.25, 1.0]), min_size=1, max_size=8),
    data=st.data(),
)
def test_best_by_scores_is_the_mean_over_all_subsets(scores: list[float], data: st.DataObject) -> None:
    right = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    k = data.draw(st.integers(1, len(scores)))
    credit = Fraction(0)
    for subset in combinations(zip(scores, right, strict=True), k):
        top = [good for score, good in subset if score == max(s for s, _ in subset)]
        credit += Fraction(sum(top), len(top))
    assert best_by_problem([scores], [right], k) == pytest.approx(float(credit / math.comb(len(scores), k)))


def test_best_by_scores_known_cases() -> None:
    right = [True, False, True, False, False]
    verdicts = [float(r) for r in right]
    assert [best_by_problem([verdicts], [right], k)[0] for k in (1, 2, 3, 5)] == pytest.approx(
        [float(pass_at_k(5, 2, k)) for k in (1, 2, 3, 5)]  # the verifier as the judge
    )
    assert best_by_problem([[0.0] * 5] * 2, [right, [True] * 5], 3).tolist() == pytest.approx([0.4, 1.0])
    assert best_by_problem([[-r for r in verdicts]], [right], 4).tolist() == [0.0]
    assert best_by_problem([[0.5] * 2000], [[True] * 1000 + [False] * 1000], 1000) == pytest.approx(0.5)
    for scores, judged, k in (([[0.0]], [[True]], 2), ([[math.nan]], [[True]], 1), ([[0.0, 1.0]], [[True]], 1), ([], [], 1)):
        with pytest.raises(BadInput):
            best_by_problem(scores, judged, k)
