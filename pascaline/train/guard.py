"""Watches a training run for what kills it in the night, and says what to do about it. docs/stability.md tells why these rules.

The loop gives two numbers a step and carries out the answer, so the state is plain and resumes exactly.
The device itself holds a step against the limits (`within`), so that a bad one changes nothing although the host hears of it later.
"""

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
from torch import Tensor

from pascaline.tables import Guard as Rule

LEAST = 64  # steps before a window says anything
UPPER = 0.95, 1.645  # this quantile of a normal distribution lies so many sigmas above its median
SMOOTH = 0.05  # weight of a new loss in the smoothed one


@dataclass
class Guard:
    """judge() before an update, drifted() after it; all state is in the fields."""

    losses: list[float] = field(default_factory=list)  # of the last steps
    norms: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # how often each kind of answer was given
    in_row: int = 0  # steps since the last one whose loss and gradient were finite
    smoothed: float | None = None
    best: float = math.inf  # of the smoothed loss
    since_best: int = 0  # steps
    above: int = 0  # steps in a row that the smoothed loss is above its best by more than the margin
    shift: int = 0  # steps of data left out by rewinds: step i trains on the data of i + shift
    slower: float = 1.0  # factor on the learning rate

    def limits(self, rule: Rule) -> tuple[float, float]:
        """Above which loss and which norm a step is a spike, from the steps judged so far; float32 numbers, as the device's are."""
        return float(np.float32(limit(self.losses, rule.sigma))), float(np.float32(limit(self.norms, rule.sigma)))

    def judge(self, rule: Rule, loss: float | None, norm: float, limits: tuple[float, float] | None = None) -> str:
        """Why this step's update must not be made, or "". loss: None where it says nothing of the model's health (rl); limits: those
        that it was held against when it ran, if that was before the last step was judged."""
        if not math.isfinite(norm) or (loss is not None and not math.isfinite(loss)):
            self.in_row += 1
            return self.count("non-finite")
        self.in_row = 0
        self.since_best += 1
        most_loss, most_norm = limits or self.limits(rule)
        high_loss, high_norm = loss is not None and loss > most_loss, norm > most_norm
        # Spikes stand in the window too: rare they do not move its limit, and when they are the new level it lets them pass.
        self.norms = [*self.norms, norm][-rule.window :]
        if loss is not None:
            self.losses = [*self.losses, loss][-rule.window :]
        if high_loss or high_norm:
            return self.count("loss spike" if high_loss else "gradient spike")
        if loss is not None:
            self._follow(rule, loss)
        return ""

    def _follow(self, rule: Rule, loss: float) -> None:
        self.smoothed = loss if self.smoothed is None else self.smoothed + SMOOTH * (loss - self.smoothed)
        if len(self.losses) >= LEAST:
            if self.smoothed < self.best:
                self.best, self.since_best = self.smoothed, 0
            self.above = self.above + 1 if self.smoothed > self.best + rule.margin else 0

    def drifted(self, rule: Rule) -> bool:
        """Whether the smoothed loss has stayed above its best for too long: go back, and tell `rewound`."""
        return 0 < rule.patience <= self.above

    def rewound(self, lost: int) -> None:
        """After the state of an older checkpoint is back: leave out the data of the `lost` steps; if an earlier rewind did the same in
        vain, the data was not to blame, so learn at a quarter of the rate."""
        self.slower = 0.25 ** self.counts.get("rewind", 0)
        self.shift += lost
        self.above = 0
        self.count("rewind")

    def count(self, kind: str) -> str:
        self.counts = {**self.counts, kind: self.counts.get(kind, 0) + 1}
        return kind

    def facts(self) -> dict[str, Any]:
        """JSON for the checkpoint; Guard(**facts) is equal."""
        return {**asdict(self), "best": self.best if math.isfinite(self.best) else None}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "Guard":
        return cls(**{**facts, "best": math.inf if facts["best"] is None else facts["best"]})


def within(limits: tuple[float, float], loss: Tensor | None, whole: Tensor, norm: Tensor) -> Tensor:
    """Whether a step may change the weights, as a bool on its device: what `judge` says "" to. whole: all parts of the loss together."""
    fine = whole.isfinite() & norm.isfinite() & (norm <= limits[1])
    return fine if loss is None else fine & loss.isfinite() & (loss <= limits[0])


def limit(window: list[float], sigma: float) -> float:
    """median + sigma robust standard deviations of a window; infinite while it is short, or sigma 0.

    The deviation is taken from the upper tail, at the 95th percentile: losses of mixed documents have two humps, of which a median
    absolute deviation sees one and calls the other a spike (docs/log.md). Up to a twentieth of the window may be outliers.
    """
    if len(window) < LEAST or not sigma:
        return math.inf
    middle = median(window)
    quantile, deviations = UPPER
    spread = (sorted(window)[int(quantile * len(window))] - middle) / deviations
    return middle + sigma * max(spread, 0.01 * abs(middle))
