"""What changes over the steps: learning rate, router balancing, multi-token weight, tokens a step."""

import math

from pascaline.tables import Optim, Stage


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up, then constant, cosine, or WSD (stay, then linear decay over the
    last `decay` share; arXiv 2404.06395), down to `final` times the peak."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = (step - optim.warmup + 1) / max(steps - optim.warmup, 1)
    if optim.schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    elif optim.schedule == "wsd":
        share = min(1.0, (1.0 - done) / optim.decay) if optim.decay else 1.0
    else:
        return optim.lr
    return optim.lr * (optim.final + (1 - optim.final) * max(share, 0.0))


def balance_rate(stage: Stage, step: int, steps: int) -> float:
    """gamma of the router bias; V3 stops it for the last 3 % of its tokens."""
    return stage.balance_rate if step < stage.balance_until * steps else 0.0


def mtp_weight(stage: Stage, step: int, steps: int) -> float:
    """lambda of the multi-token loss; V3 takes .3 for two thirds of its tokens, then .1."""
    return stage.mtp if step < stage.mtp_until * steps else min(stage.mtp, stage.mtp_final)


def ramp(tokens: int, row: int, rows: int, first: int, until: int) -> list[int]:
    """Rows of `row` tokens in each step until `tokens` are reached: from `first` rows in a straight line over `until` tokens to `rows`."""
    out: list[int] = []
    seen = 0
    while seen < tokens:
        now = rows if seen >= until else first + (rows - first) * seen // until
        out.append(max(now, 1))
        seen += out[-1] * row
    return out
