"""Grading as a puzzle, `grade:PUZZLE`: a problem, an attempt at it, and the question whether the attempt is right or where it goes wrong.

A verifier of its own kind, trained as any other model is, and itself judged by whether the fault it names is real (the meta-verification of
DeepSeekMath-V2, arXiv 2511.22570, where the puzzle can check that exactly): to say that a wrong attempt is wrong somewhere earns nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from pascaline.data import puzzles
from pascaline.data.puzzles import base
from pascaline.data.puzzles.base import WHITESPACE, Dial, Gradable, Problem, Trace, Verdict, share
from pascaline.errors import BadInput

PREFIX = "grade:"
RIGHT = base.RIGHT
PARTS = ("attempt", "check", "review")


@dataclass(frozen=True)
class Grade:
    """Grading attempts at the puzzle of this name, with its dials."""

    name: str
    LEVELS: Mapping[str, Dial]

    def generate(self, rng: random.Random, **dials: Any) -> Problem:
        """A problem of the puzzle's, and an attempt of those that it has for this."""
        puzzle = _gradable(self.name)
        problem = replace(puzzle.generate(rng, **dials), puzzle=self.name)
        tried = puzzle.attempt(problem, rng)
        return ask(problem, tried.thought, tried.answer)

    def trace(self, problem: Problem, rng: random.Random, slip: float = 0.0) -> Trace:
        """The review, and the grade; with share `slip` they are those of another attempt at the same problem, as if this were misread."""
        share(PREFIX + self.name, slip=slip)
        inner, thought, answer = _parts(problem)
        puzzle = _gradable(self.name)
        if rng.random() < slip:
            other = puzzle.attempt(inner, rng)
            thought, answer = other.thought, other.answer
        return Trace(puzzle.review(inner, thought, answer), puzzle.check(inner, thought, answer))

    def solve(self, problem: Problem) -> str:
        """The grade."""
        return _gradable(self.name).check(*_parts(problem))

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """RIGHT for exactly the grade: the fault must be the one that is there."""
        return Verdict.RIGHT if answer.strip(WHITESPACE) == self.solve(problem) else Verdict.WRONG


def get(name: str) -> Grade:
    """The puzzle of this name, `grade:PUZZLE`; BadInput if there is no such puzzle, or its attempts cannot be checked."""
    inner = name.removeprefix(PREFIX)
    return Grade(inner, _gradable(inner).LEVELS)


def ask(problem: Problem, thought: str, answer: str) -> Problem:
    """The problem of grading an attempt at `problem`. Its key is that of the problem, so that both are on one side of the split.

    The prompt has the problem, of the attempt's thought and answer what the puzzle has graded, and no more. BadInput if it grades nothing.
    """
    graded = _gradable(problem.puzzle).GRADED
    thought, answer = (text.strip(WHITESPACE) if part in graded else "" for part, text in (("thought", thought), ("answer", answer)))
    prompt = "\n".join(["Grade this.", problem.prompt, *([thought] if thought else []), f"Answer: {answer}"])
    return Problem(PREFIX + problem.puzzle, prompt, problem.key, {"problem": asdict(problem), "thought": thought, "answer": answer})


def _gradable(name: str) -> Gradable:
    puzzle = puzzles.get(name)
    missing = [part for part in PARTS if not callable(getattr(puzzle, part, None))]
    if missing:
        raise BadInput(f"puzzle '{PREFIX}{name}': attempts at '{name}' cannot be graded, it lacks {', '.join(missing)}.")
    return cast(Gradable, puzzle)


def _parts(problem: Problem) -> tuple[Problem, str, str]:
    """The problem, and the thought and the answer to be graded."""
    data = problem.data
    return Problem(**data["problem"]), data["thought"], data["answer"]
