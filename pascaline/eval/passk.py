"""What k samples are worth: pass@k, majority vote, best by a judge's scores, and intervals that count problems, not samples."""

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pascaline.errors import BadInput

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile: two-sided 95 %
EXACT_SUBSETS = 2000  # enumerate up to here (n=8 at any k, n=16 at k=4, n=32 at k=2)
SAMPLED_SUBSETS = 400


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """Chance that at least one of k samples is right, unbiased: 1 - C(n-c, k) / C(n, k), per problem.

    n: samples drawn; c: how many were right; both broadcast to the shape returned. Also best-of-k by a verifier.
    Raises BadInput unless 1 <= k <= n and 0 <= c <= n. Source: Chen et al. 2021, "Evaluating Large Language Models
    Trained on Code", equation 1. Computed in whole numbers, so no rounding whatever n.
    """
    drawn, right = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if drawn.size and (k < 1 or k > drawn.min()):
        raise BadInput(f"pass@{k} needs 1 <= k <= samples per problem, which is {drawn.min()} at the least")
    if drawn.size and (right.min() < 0 or (right > drawn).any()):
        raise BadInput("pass@k needs between 0 and n right samples out of n on every problem")
    pairs, where = np.unique(np.stack([drawn.ravel(), right.ravel()]), axis=1, return_inverse=True)
    values = [1 - math.comb(int(a - b), k) / math.comb(int(a), k) for a, b in pairs.T]
    return np.asarray(values, dtype=np.float64)[where.ravel()].reshape(drawn.shape)


def majority(answers: Sequence[Sequence[Hashable | None]], right: Sequence[Sequence[bool]], k: int, seed: int = 0) -> float:
    """Mean over problems of `majority_by_problem`: the accuracy to expect from a vote among k samples."""
    return float(np.mean(majority_by_problem(answers, right, k, seed)))


def majority_by_problem(
    answers: Sequence[Sequence[Hashable | None]], right: Sequence[Sequence[bool]], k: int, seed: int = 0
) -> NDArray[np.float64]:
    """Chance that the most frequent answer among k of a problem's samples is right, one number a problem.

    answers[p][i]: the final answer of sample i, None if it abstained: it does not vote, and where nobody votes the vote
    is wrong. right[p][i]: the verifier's word. A tie is drawn by lot, so each of the tied answers counts its share.
    Exact over all subsets of size k where they are few, else over SAMPLED_SUBSETS seeded ones. Raises BadInput if a
    problem has fewer than k samples. Source: Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in
    Language Models", section 2 (unweighted vote).
    """
    if not answers or len(answers) != len(right):
        raise BadInput(f"a majority vote needs a verdict list per problem, got {len(answers)} problems, {len(right)} lists")
    rng = np.random.default_rng(seed)
    values = [_vote(given, judged, k, rng) for given, judged in zip(answers, right, strict=True)]
    return np.asarray(values, dtype=np.float64)


def _vote(given: Sequence[Hashable | None], judged: Sequence[bool], k: int, rng: np.random.Generator) -> float:
    """S subsets, N samples, A distinct answers: membership_SN @ is_NA counts the votes."""
    samples = len(given)
    if len(judged) != samples or not 1 <= k <= samples:
        raise BadInput(f"a vote among {k} needs 1 <= k <= samples, got {samples} answers and {len(judged)} verdicts on a problem")
    names = {answer: i for i, answer in enumerate(dict.fromkeys(a for a in given if a is not None))}
    if not names:
        return 0.0
    is_NA = np.zeros((samples, len(names)), dtype=np.float32)
    for i, answer in enumerate(given):
        if answer is not None:
            is_NA[i, names[answer]] = 1
    # A verifier that judges one answer in two ways is taken at its mean.
    worth_A = np.asarray(judged, dtype=np.float32) @ is_NA / is_NA.sum(0)
    votes_SA = _members(samples, k, rng) @ is_NA
    most_S1 = votes_SA.max(1, keepdims=True)
    tied_SA = (votes_SA == most_S1) & (most_S1 > 0)
    credit_S = (tied_SA @ worth_A) / np.maximum(tied_SA.sum(1), 1)
    return float(credit_S.mean())


def best_by_problem(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool]], k: int) -> NDArray[np.float64]:
    """Chance that the best-scored of k of a problem's samples is right, one number a problem.

    scores[p][i]: a judge's score of sample i, more is better, -inf for one that cannot be chosen while there is another. Equal scores are
    drawn by lot. Exact over all subsets of size k, without enumerating them: of n samples those scored higher than a group of s equal ones
    are h, so the group holds the best of C(n-h, k) - C(n-h-s, k) subsets, and then its mean worth is what a draw among those of it that are
    in the subset comes to. With the verdicts as scores it is pass_at_k. Raises BadInput if a problem has fewer than k samples.
    """
    if not scores or len(scores) != len(right):
        raise BadInput(f"best of k needs a verdict list per problem, got {len(scores)} problems, {len(right)} lists")
    return np.asarray([_best(given, judged, k) for given, judged in zip(scores, right, strict=True)], dtype=np.float64)


def _best(scores: Sequence[float], judged: Sequence[bool], k: int) -> float:
    samples = len(scores)
    if len(judged) != samples or not 1 <= k <= samples or any(math.isnan(score) for score in scores):
        raise BadInput(f"best of {k} needs 1 <= k <= samples and scores that are numbers, got {samples} scores, {len(judged)} verdicts")
    groups: dict[float, list[bool]] = {}
    for score, good in sorted(zip(scores, judged, strict=True), key=lambda pair: -pair[0]):
        groups.setdefault(score, []).append(bool(good))
    chance, left = 0.0, samples
    for group in groups.values():
        first = math.comb(left, k) - math.comb(left - len(group), k)
        chance += first / math.comb(samples, k) * sum(group) / len(group)
        left -= len(group)
    return chance


def _members(samples: int, k: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """[S, samples] of 0 and 1, k ones a row: every subset where they are few, else random ones."""
    if math.comb(samples, k) <= EXACT_SUBSETS:
        return _every_subset(samples, k)
    picks = rng.random((SAMPLED_SUBSETS, samples)).argpartition(k, axis=1)[:, :k]
    members = np.zeros((SAMPLED_SUBSETS, samples), dtype=np.float32)
    np.put_along_axis(members, picks, 1, axis=1)
    return members


@lru_cache(maxsize=32)
def _every_subset(samples: int, k: int) -> NDArray[np.float32]:
    picks = np.asarray(list(combinations(range(samples), k)))
    members = np.zeros((len(picks), samples), dtype=np.float32)
    np.put_along_axis(members, picks, 1, axis=1)
    members.setflags(write=False)
    return members


def mean_interval(means: ArrayLike, bounded: bool = True) -> tuple[float, float, float]:
    """(mean, low, high): 95 % interval of an accuracy from one mean in [0, 1] per problem.

    Problems are the clusters: several samples of a problem share its difficulty and are no independent evidence. Normal
    approximation mean +- 1.96 * sd / sqrt(n), cut to [0, 1]; where all means are equal 0 or 1, or there is one problem,
    that width would be zero, and Wilson's score interval (Wilson 1927) on n problems stands in. bounded=False: of values
    that are no shares; nothing is cut then, and one value alone has an interval of NaN. Raises BadInput for no problems.
    """
    values = np.asarray(means, dtype=np.float64).ravel()
    if values.size == 0:
        raise BadInput("an interval needs at least one problem")
    mean = float(values.mean())
    if bounded and (values.size == 1 or mean in (0.0, 1.0)):
        return mean, *_wilson(mean, values.size)
    half = Z * float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.nan
    if not bounded:
        return mean, mean - half, mean + half
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def paired_difference(a: ArrayLike, b: ArrayLike, bounded: bool = True) -> tuple[float, float, float]:
    """(mean of a - b, low, high): 95 % interval of a gain on the same problems, so pass (after, before).

    Normal approximation on the per-problem differences, which cancels what the problems' difficulty adds to the spread.
    Where all differences are equal, the half-width is what Wilson leaves for an event never seen in n problems.
    bounded=False: of values that are no shares, where nothing is cut and equal differences leave no width.
    Raises BadInput for unequal or zero counts.
    """
    first, second = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    if first.size != second.size or first.size == 0:
        raise BadInput(f"a paired difference needs the same problems on both sides, got {first.size} and {second.size}")
    gains = first - second
    mean = float(gains.mean())
    spread = float(gains.std(ddof=1)) if gains.size > 1 else 0.0
    if not bounded:
        half = Z * spread / math.sqrt(gains.size) if gains.size > 1 else math.nan
        return mean, mean - half, mean + half
    half = Z * spread / math.sqrt(gains.size) if spread > 0 else _wilson(0.0, gains.size)[1]
    return mean, max(-1.0, mean - half), min(1.0, mean + half)


def _wilson(p: float, n: int) -> tuple[float, float]:
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # The bounds touch 0 at p = 0 and 1 at p = 1 exactly; rounding must not say otherwise.
    return (0.0 if p == 0 else max(0.0, centre - half)), (1.0 if p == 1 else min(1.0, centre + half))
