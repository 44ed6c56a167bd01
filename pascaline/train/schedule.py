"""Learning rate over steps."""

import math

from pascaline.recipe import Optim


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
