"""A puzzle that a model which has learnt nothing solves about half the time: say any digit, even ones are right. A throw can be graded."""

import random
from typing import Any, ClassVar

from pascaline.data.puzzles import Problem, Trace, Verdict


class Coin:
    LEVELS: ClassVar[dict[str, Any]] = {}
    GRADED = ("answer",)

    def generate(self, rng: random.Random) -> Problem:
        number = rng.randrange(10_000)
        return Problem("coin", f"Coin {number}?", f"coin {number}", {})

    def trace(self, problem: Problem, rng: random.Random, biased: float = 0.5) -> Trace:
        return Trace("toss", str(2 * rng.randrange(5) + (rng.random() < biased)))

    def solve(self, problem: Problem) -> str:
        return "0"

    def verify(self, problem: Problem, answer: str) -> Verdict:
        return Verdict.RIGHT if answer and answer in "02468" else Verdict.WRONG

    def attempt(self, problem: Problem, rng: random.Random) -> Trace:
        return self.trace(problem, rng)

    def check(self, problem: Problem, thought: str, answer: str) -> str:
        return "right" if self.verify(problem, answer) is Verdict.RIGHT else f"odd {answer}"

    def review(self, problem: Problem, thought: str, answer: str) -> str:
        return answer


def puzzle() -> Coin:
    return Coin()
