"""What every puzzle speaks: a problem, a written-out trace, a verdict, and the dials of difficulty."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from pascaline.errors import BadInput, nearest

RIGHT = "right"  # the grade of an attempt without a fault
WHITESPACE = " \t\r\n"  # what may stand around an answer; str.strip() alone would also drop unicode spaces


@dataclass(frozen=True)
class Problem:
    """One problem. `key` names it up to wording: equal keys are the same problem. `data` is JSON-able. `verifier` names who judges its
    answers, with `data` as columns (pascaline.post.verifiers), where that is not the puzzle itself."""

    puzzle: str
    prompt: str
    key: str
    data: dict[str, Any]
    verifier: str = ""


@dataclass(frozen=True)
class Trace:
    """A written-out try at a problem: the thought, and the answer that stands behind it."""

    thought: str
    answer: str


class Verdict(StrEnum):
    """RIGHT and WRONG are the verifier's; ABSTAIN means that the answer itself says it found none, UNJUDGED that the verifier could not
    judge it (it ran out of time or broke), which says nothing about the answer."""

    RIGHT = "right"
    WRONG = "wrong"
    ABSTAIN = "abstain"
    UNJUDGED = "unjudged"


class Dial(NamedTuple):
    """A whole-number difficulty dial: its default and the range it may be turned in, both ends included."""

    default: int
    low: int
    high: int


class Puzzle(Protocol):
    """What a puzzle module (or a plugin's object) provides. It may also have turns(problem, environment, rng) -> list[Trace], a worked
    episode: what the model thinks and says in each turn, the final answer in the last. What the environment answers is not written, for a
    worked episode is played (pascaline/post/environments/worked.py)."""

    LEVELS: Mapping[str, Dial]

    def generate(self, rng: random.Random, **dials: Any) -> Problem: ...

    def trace(self, problem: Problem, rng: random.Random, **quality: Any) -> Trace: ...

    def solve(self, problem: Problem) -> str | None: ...

    def verify(self, problem: Problem, answer: str) -> Verdict: ...


class Gradable(Puzzle, Protocol):
    """What a puzzle has besides if attempts at it can be graded (grade.py). All three are optional together."""

    GRADED: Sequence[str]  # what of an attempt the grader reads: "thought", "answer", or both

    def attempt(self, problem: Problem, rng: random.Random) -> Trace:
        """A try to be graded, right in about half of the cases."""
        ...

    def check(self, problem: Problem, thought: str, answer: str) -> str:
        """RIGHT, or the first fault, as a grader must name it. RIGHT only for what `verify` finds right, too."""
        ...

    def review(self, problem: Problem, thought: str, answer: str) -> str:
        """The worked thought of a perfect grader, at whose end that grade is plain."""
        ...


def turn(puzzle: str, levels: Mapping[str, Dial], dials: Mapping[str, Any], rng: random.Random) -> dict[str, int]:
    """One value per dial: its default, the number given, or a draw from the [low, high] given.

    Raises BadInput for an unknown dial or a value out of its range.
    """
    for name in dials:
        if name not in levels:
            close, all_ = nearest(name, levels), ", ".join(levels)
            raise BadInput(f"puzzle '{puzzle}' has no dial '{name}'{close} (it has {all_})")
    values = {}
    for name, dial in levels.items():
        value = dials.get(name, dial.default)
        low, high = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, value)
        if not (type(low) is type(high) is int and dial.low <= low <= high <= dial.high):
            raise BadInput(
                f"puzzle '{puzzle}': {name}={value!r} must be a whole number from {dial.low} to {dial.high}, or a pair [from, to] of such"
            )
        values[name] = low + int(rng.random() * (high - low + 1)) if high > low else low
    return values


def share(puzzle: str, **shares: float) -> None:
    """Raises BadInput unless each named share is a number from 0 to 1."""
    for name, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise BadInput(f"puzzle '{puzzle}': {name}={value!r} must be a share from 0 to 1")
