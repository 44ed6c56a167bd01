"""Attempts at the coin to be graded: right if the answer is an even digit, else the fault is "line 1"."""

import random
from typing import Any, ClassVar

from coin import Coin

from pascaline.data.puzzles import Problem, Trace, Verdict

NAME = "grade:coin:puzzle"


class Graded:
    LEVELS: ClassVar[dict[str, Any]] = {}

    def generate(self, rng: random.Random) -> Problem:
        coin = Coin()
        problem = coin.generate(rng)
        return ask(problem, "toss", coin.trace(problem, rng).answer)

    def trace(self, problem: Problem, rng: random.Random) -> Trace:
        return Trace("look", self.solve(problem))

    def solve(self, problem: Problem) -> str:
        return "right" if Coin().verify(problem, problem.data["answer"]) is Verdict.RIGHT else "line 1"

    def verify(self, problem: Problem, answer: str) -> Verdict:
        return Verdict.RIGHT if answer.strip() == self.solve(problem) else Verdict.WRONG


def ask(problem: Problem, thought: str, answer: str) -> Problem:
    return Problem(NAME, f"Grade {thought} {answer}", problem.key, {"thought": thought, "answer": answer})
