"""Answers to reasoning-gym's problems, judged by the family's own scorer: full pay is right, any part of it is wrong."""

from collections.abc import Sequence
from typing import Any

from pascaline.errors import BadInput
from pascaline.post.verifiers.base import Scores, answers, column
from pascaline.post.verifiers.pool import Failure, shared

TIMEOUT = 20.0  # seconds; in a process that is new, 1 to 10 of them go into importing reasoning-gym
COLUMNS = ("family", "seed", "config", "question", "answer")


def gym(prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
    """1.0 if the scorer pays in full for the answer, else 0.0; None if it did not come to an end. columns: those of a `gym:` problem
    (data/puzzles/gym.py), which name the item. It is made again in a process that can be killed, and judged there."""
    items = list(zip(*(column(columns, "gym", name) for name in COLUMNS), strict=True))
    said = answers(completions)
    calls = [[*item, answer] for item, answer in zip(items, said, strict=True) if answer is not None]
    found = iter(shared(TIMEOUT).map("pascaline.data.puzzles.gym:score", calls))
    given = [0.0 if answer is None else next(found) for answer in said]  # a thought that was never closed has no answer
    for one in given:
        if isinstance(one, Failure) and one.text.startswith("BadInput: "):  # of the data: no answer is at fault
            raise BadInput(one.text.removeprefix("BadInput: "))
    return [None if isinstance(one, Failure) else one for one in given]
