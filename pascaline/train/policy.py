"""What a sampled token teaches: the losses of the GRPO family, one formula with named parts.

Shapes: m sampled tokens of any number of answers. log_ratio = log pi(token) - log pi_old(token), where pi_old is the policy that sampled;
advantage is that of the token's answer. How tokens are averaged (over all, or over each answer first) is the batch's weight stream.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FAR = 20.0  # log ratios are cut here, so that no exp overflows; verl's bound


@dataclass(frozen=True)
class Policy:
    """Constants of the policy loss.

    ratio: of each token, or of the whole answer, exp(mean over its tokens of log_ratio) (GSPO, arXiv 2507.18071 eq. 7).
    surrogate: "clip", -min(r A, clip(r) A) (PPO, arXiv 1707.06347 eq. 7), or "cispo", -sg(clip(r)) A log pi (arXiv 2506.13585 eq. 4),
    in which no token loses its gradient. clip_low, clip_high: the range of r is 1 - clip_low to 1 + clip_high (DAPO, arXiv 2503.14476).
    kl: weight of the distance to the reference, k3 of Schulman's note; unbiased: times r, as V3.2 does. stale: delta of `fresh`, 0: none.
    replay: the experts that the batch records in `routes` are used, not those that the routers choose now (R3, arXiv 2510.11370).
    """

    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0
    unbiased: bool = False
    stale: float = 0.0
    replay: bool = False


def policy_loss(
    logprob: Tensor, log_ratio: Tensor, advantage: Tensor, answer: Tensor, sampled: Tensor, rule: Policy
) -> tuple[Tensor, Tensor]:
    """Loss of each token [m], and where (1, else 0) the clip holds the gradient back, or bounds cispo's weight.

    answer [m]: which answer the token is of; an answer's tokens stand together. sampled [m]: 1 for the tokens that were sampled; no mean
    is over others."""
    r = (of_answer(log_ratio, answer, sampled) if rule.ratio == "sequence" else log_ratio).clamp(-FAR, FAR).exp()
    bounded = r.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    if rule.surrogate == "cispo":
        loss, clipped = -bounded.detach() * advantage * logprob, bounded != r
    else:
        free, held = r * advantage, bounded * advantage
        loss, clipped = -torch.minimum(free, held), held < free
    return loss, clipped.float()


def fresh(gap: Tensor, advantage: Tensor, answer: Tensor, sampled: Tensor, delta: float) -> Tensor:
    """0 for the tokens, [m], that the policy has moved too far from to learn from as a bad example, 1 for the others: V3.2's mask of
    off-policy sequences (arXiv 2512.02556 section 3.1), advantage < 0 and the answer's mean of log pi_sampler - log pi above delta.

    gap [m]: log pi - log pi_sampler, whoever's engine sampled."""
    far = of_answer(-gap.detach(), answer, sampled) > delta
    return (~(far & (advantage < 0))).float()


def corrected(own: Tensor, engine: Tensor, cap: float, low: float, high: float) -> Tensor:
    """What each token's loss is to be multiplied by, as another engine than the trainer's sampled it; any shape.

    own, engine: their log-probabilities with the weights of that moment; w = exp(own - engine). min(w, cap), truncated importance sampling
    (Yao et al. 2025; 0: w has no say), and 0 where w is outside low .. high (IcePop, arXiv 2510.18855, masks and multiplies: cap = high;
    high 0: no upper end)."""
    w = (own - engine).clamp(-FAR, FAR).exp()
    inside = (w >= low) & (w <= high) if high else w >= low
    return (w.clamp(max=cap) if cap else torch.ones_like(w)) * inside


def of_answer(values: Tensor, answer: Tensor, sampled: Tensor) -> Tensor:
    """For each token the mean of `values` over the sampled tokens of its answer; [m], with gradient. No wait for the device: the sums have
    a place for each token, which is more than there are answers."""
    place = torch.zeros_like(answer)
    place[1:] = (answer[1:] != answer[:-1]).cumsum(0)
    sums = torch.zeros_like(values).index_add(0, place, values * sampled)
    counts = torch.zeros_like(values).index_add(0, place, sampled.to(values.dtype))
    return (sums / counts.clamp(min=1))[place]


def k3(logprob: Tensor, reference: Tensor) -> Tensor:
    """exp(ref - lp) - (ref - lp) - 1: a non-negative estimate of KL(policy || reference) per token (Schulman 2020)."""
    difference = (reference - logprob).clamp(-FAR, FAR)
    return difference.exp() - difference - 1


def distance(logprob: Tensor, reference: Tensor, log_ratio: Tensor | None, rule: Policy) -> Tensor:
    """The KL term of each token, without its weight: k3, or r k3, whose gradient is unbiased off-policy too."""
    estimate = k3(logprob, reference)
    return log_ratio.clamp(-FAR, FAR).exp() * estimate if rule.unbiased and log_ratio is not None else estimate
