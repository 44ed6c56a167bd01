"""The losses of the GRPO family, each against its paper's formula written out here on its own, answer by answer."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.train.policy import Policy, distance, k3, of_answer, policy_loss


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alone(log_ratio: torch.Tensor, advantage: torch.Tensor, rule: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and clipped of tokens that are an answer each."""
    each = torch.arange(log_ratio.numel())
    return policy_loss(log_ratio.view(-1), log_ratio.view(-1), advantage.view(-1), each, torch.ones(len(each)), rule)


@settings(max_examples=300, deadline=None)
@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(0.05, 0.5), st.floats(0.05, 0.9))
def test_the_clipped_surrogate_is_the_papers(log_ratio, advantage, low, high):
    x = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(advantage, dtype=torch.float64)
    loss, held = alone(x, a, Policy(clip_low=low, clip_high=high))
    ratio = math.exp(log_ratio)
    expected = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    loss.sum().backward()
    blocked = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
    assert x.grad.item() == pytest.approx(0.0 if blocked else -ratio * advantage, rel=1e-6, abs=1e-12)
    if abs(ratio - 1 - high) > 1e-6 and abs(ratio - 1 + low) > 1e-6 and abs(advantage) > 1e-6:
        assert bool(held) == blocked


def test_the_upper_clip_is_higher():
    """DAPO: what was unlikely may become likely; ratio 1.25 still learns, 0.75 does not."""
    log_ratio = torch.tensor([1.25, 1.35, 0.85, 0.75]).log().requires_grad_()
    loss, held = alone(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), Policy())
    loss.sum().backward()
    assert (log_ratio.grad != 0).tolist() == [True, False, True, False] and held.tolist() == [0, 1, 0, 1]


def test_absurd_ratios_stay_finite():
    for rule in (Policy(), Policy(ratio="sequence"), Policy(surrogate="cispo")):
        log_ratio = torch.tensor([1e4, -1e4, 90.0], requires_grad=True)
        loss, _ = alone(log_ratio, torch.tensor([-1.0, 1.0, -1.0]), rule)
        loss.sum().backward()
        assert loss.isfinite().all() and log_ratio.grad.isfinite().all()


# ---- whole answers ---------------------------------------------------------------------------------------------------

LENGTHS = (3, 1, 4)
ANSWER = torch.tensor([7, 7, 7, 2, 9, 9, 9, 9])
ADVANTAGE = torch.tensor([0.8, 0.8, 0.8, -1.2, -0.5, -0.5, -0.5, -0.5])


def answers(seed: int = 0, scale: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi with gradient, log pi_old, each [8], of answers of 3, 1 and 4 tokens."""
    old = randn(8, seed=seed).double() - 2
    return (old + scale * randn(8, seed=seed + 1)).requires_grad_(), old


def found(rule: Policy, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss [8], gradient of its sum, where the clip holds it back."""
    logprob, old = answers(seed)
    loss, clipped = policy_loss(logprob, logprob - old, ADVANTAGE.double(), ANSWER, torch.ones(8), rule)
    loss.sum().backward()
    return loss.detach(), logprob.grad, clipped


@pytest.mark.parametrize("seed", range(6))
def test_gspo(seed):
    """arXiv 2507.18071 eq. 5 to 7: s = (pi(y) / pi_old(y))^(1 / |y|), clipped as a whole."""
    rule = Policy(ratio="sequence", clip_low=0.1, clip_high=0.15)
    loss, gradient, clipped = found(rule, seed)
    logprob, old = answers(seed)
    whole = []
    for start, length, a in ((0, 3, 0.8), (3, 1, -1.2), (4, 4, -0.5)):
        s = ((logprob[start : start + length].sum() - old[start : start + length].sum()) / length).exp()
        whole.append(-torch.minimum(s * a, s.clamp(0.9, 1.15) * a))
    assert loss.tolist() == pytest.approx([w.item() for w, n in zip(whole, LENGTHS, strict=True) for _ in range(n)])
    sum(w * n for w, n in zip(whole, LENGTHS, strict=True)).backward()  # type: ignore[union-attr]
    assert gradient.tolist() == pytest.approx(logprob.grad.tolist())
    for start, length in ((0, 3), (3, 1), (4, 4)):
        assert len(set(clipped[start : start + length].tolist())) == 1


@pytest.mark.parametrize("seed", range(6))
def test_cispo(seed):
    """arXiv 2506.13585 eq. 4: -sg(clip(r)) A log pi: a bounded weight, and no token without a gradient."""
    loss, gradient, _ = found(Policy(surrogate="cispo", clip_low=1.0, clip_high=0.3), seed)
    logprob, old = answers(seed)
    weight = (logprob - old).exp().clamp(0, 1.3).detach()
    assert loss.tolist() == pytest.approx((-weight * ADVANTAGE * logprob).tolist())
    assert gradient.tolist() == pytest.approx((-weight * ADVANTAGE).tolist()) and gradient.ne(0).all()


def test_on_policy_all_of_them_have_the_plain_gradient():
    """At a ratio of 1 every one of the family is REINFORCE with the advantage: gradient -A, over the length for whole answers."""
    for rule in (Policy(), Policy(surrogate="cispo")):
        logprob = randn(8).requires_grad_()
        policy_loss(logprob, logprob - logprob.detach(), ADVANTAGE, ANSWER, torch.ones(8), rule)[0].sum().backward()
        assert logprob.grad.tolist() == pytest.approx((-ADVANTAGE).tolist())
    logprob = randn(8).requires_grad_()
    policy_loss(logprob, logprob - logprob.detach(), ADVANTAGE, ANSWER, torch.ones(8), Policy(ratio="sequence"))[0].sum().backward()
    assert logprob.grad.tolist() == pytest.approx((-ADVANTAGE).tolist())  # |y| tokens, each with 1 / |y| of every one's gradient


def test_tokens_that_were_not_sampled_are_in_no_mean():
    values, sampled = torch.tensor([1.0, 5.0, 3.0, 9.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert of_answer(values, torch.tensor([4, 4, 4, 4]), sampled).tolist() == [2.0] * 4
    assert of_answer(values, torch.tensor([4, 4, 6, 6]), sampled).tolist() == [1.0, 1.0, 3.0, 3.0]


# ---- distance to a reference -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.floats(-10, 0), st.floats(-10, 0))
def test_k3_is_a_distance(logprob, reference):
    value = k3(torch.tensor(logprob, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)).item()
    difference = reference - logprob
    assert value >= 0 and value == pytest.approx(math.exp(difference) - 1 - difference, rel=1e-9, abs=1e-12)
    assert k3(torch.tensor(logprob), torch.tensor(logprob)).item() == 0


def test_k3_averages_to_the_divergence():
    """Over samples of the policy it is an unbiased estimate of KL(policy || reference)."""
    policy, reference = randn(61).log_softmax(-1).double(), randn(61, seed=1).log_softmax(-1).double()
    expected = (policy.exp() * (policy - reference)).sum()
    assert float((policy.exp() * k3(policy, reference)).sum()) == pytest.approx(float(expected), rel=1e-6)


def test_only_the_unbiased_distance_has_the_divergences_gradient():
    """Over samples of an older policy, as V3.2 says; and k3 alone is off even over samples of the policy itself."""
    logits, old = randn(12).double().requires_grad_(), (randn(12) + 0.5 * randn(12, seed=3)).double().log_softmax(-1)
    reference = randn(12, seed=1).log_softmax(-1).double()

    def gradient(rule: Policy) -> list[float]:
        policy = logits.log_softmax(-1)
        loss = (old.exp() * distance(policy, reference, policy - old, rule)).sum()
        return torch.autograd.grad(loss, logits)[0].tolist()

    policy = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits)
    assert gradient(Policy(kl=1.0, unbiased=True)) == pytest.approx(expected.tolist(), abs=1e-9)
    assert gradient(replace(Policy(kl=1.0))) != pytest.approx(expected.tolist(), abs=1e-2)
