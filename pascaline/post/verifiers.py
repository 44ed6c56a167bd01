"""Verdicts on what a model answered, and rewards from verdicts.

A verifier plugin has TRL's reward signature: f(prompts, completions, completion_ids, **columns) -> list[float | None], where None
means that it could not judge. `puzzle_reward` is the built-in one.
"""

from collections.abc import Sequence
from typing import Any

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output


def verdict(problem: Problem, output: Output) -> Verdict:
    """The puzzle's own verdict on the answer. An answer that hit the length limit, in the thought or after it, is wrong: what was
    not finished was not said."""
    if output.finish_reason != "stop" or output.reasoning is None:
        return Verdict.WRONG
    return puzzles.get(problem.puzzle).verify(problem, output.text)


def puzzle_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list[float | None]:
    """1.0 for a right answer, else 0.0. columns: `problem`, one Problem a completion. A completion is `thought</think>answer`;
    without a closed thought it is wrong."""
    rewards: list[float | None] = []
    for problem, text in zip(columns["problem"], completions, strict=True):
        _, closed, answer = text.partition("</think>")
        right = bool(closed) and puzzles.get(problem.puzzle).verify(problem, answer) is Verdict.RIGHT
        rewards.append(float(right))
    return rewards
