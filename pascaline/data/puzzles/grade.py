"""Grading as a puzzle, `grade:PUZZLE`: a problem, an attempt at it, and the question whether the attempt is right or where it goes wrong.

A verifier of its own kind, trained as any other model is, and itself judged by whether the fault it names is real (the meta-verification of
DeepSeekMath-V2, arXiv 2511.22570, where the puzzle can check that exactly).
"""

from __future__ import annotations

from pascaline.data.puzzles.base import Problem

PREFIX = "grade:"
RIGHT = "right"  # the grade of an attempt without a fault


def gradable(puzzle: str) -> bool:
    """Whether attempts at this puzzle can be checked step by step."""
    raise NotImplementedError


def ask(problem: Problem, thought: str, answer: str) -> Problem:
    """The problem of grading an attempt at `problem`. Its key is that of the problem, so that both are on one side of the split."""
    raise NotImplementedError
