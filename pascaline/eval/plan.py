"""How a task is asked, and what every measurement tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from pydantic import Field, model_validator

from pascaline.eval import passk
from pascaline.tables import Table

if TYPE_CHECKING:
    from pascaline.engine import Engine  # which would load torch

SEED = 1_000_003  # of the evaluation's problems: one set for every model, so that models can be compared


class Plan(Table):
    """One task of a suite. task: KIND or KIND:ARGUMENT (docs/evaluation.md); name: what tables call it, if not that. problems: at most so
    many; samples: answers to each; seed: of the problems and of the samples; system: a system message before each problem; plain: asked
    as plain text, for a model that knows no chat; sha256: of the argument's file, so that another one is refused; dials: the task's own
    settings."""

    task: str
    name: str = ""
    problems: int = Field(200, ge=1)
    samples: int = Field(1, ge=1)
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(512, ge=1)
    seed: int = Field(SEED, ge=0)
    system: str = ""
    plain: bool = False
    sha256: str = ""
    dials: dict[str, Any] = Field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What stands before the colon of the task's name, or all of it."""
        return self.task.partition(":")[0]

    @property
    def argument(self) -> str:
        """What stands behind the colon of the task's name."""
        return self.task.partition(":")[2]

    @property
    def label(self) -> str:
        """What tables and results call it."""
        return self.name or self.task

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"temperature 0 is greedy, so that {self.samples} samples are {self.samples} times the same; take one")
        return self


class Task(Protocol):
    """What a task's name stands for. It is asked of one model after the other, and must put the same problems to each of them."""

    def __call__(self, engine: Engine, plan: Plan, watch: Callable[[int, int], None]) -> dict[str, Any]:
        """A measurement, as `measured` makes it; JSON. watch is called with (problems done, of how many) now and then; it may raise, to
        stop."""


def measured(
    values: Sequence[float | None], keys: Sequence[str], better: str = "higher", unit: str = "share", **facts: Any
) -> dict[str, Any]:
    """A measurement: values, one a problem (a share from 0 to 1, the mean of its samples; None where none could be judged), keys, which
    name the problems, so that two models are compared problem by problem; better: "higher" or "lower"; unit: of values that are no
    shares; facts: whatever else is told.

    score is the mean with its 95 % interval, low to high; n: problems with a value.
    """
    known = [value for value in values if value is not None]
    score, low, high = passk.mean_interval(known, bounded=unit == "share") if known else (None, None, None)
    return {
        "score": score,
        "low": low,
        "high": high,
        "n": len(known),
        "better": better,
        "unit": unit,
        **facts,
        "keys": list(keys),
        "values": list(values),
    }
