"""Worked episodes: what a puzzle says in each turn, and what the environment really answers, as chats to learn from. Imports no torch.

A model that has never seen a call makes none, so there is nothing for reinforcement to reward: it has to be shown some first.
"""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pascaline.data.chats import Chat
from pascaline.data.puzzles import Problem, Trace
from pascaline.data.puzzles.families import Family
from pascaline.errors import BadInput
from pascaline.post import environments
from pascaline.post.environments.base import TURNS, opening


def episodes(family: Family, problems: list[Problem], environment: str, seed: int) -> Iterator[Chat]:
    """A worked episode of each problem; BadInput for a puzzle that writes none for this environment."""
    for i, problem in enumerate(problems):
        turns = family.turns(problem, environment, random.Random(f"episode {seed} {family.name} {i}"))
        yield played(environment, problem, turns, f"puzzle:{family.name}:{i}")


def check(family: Family, environment: str, seed: int) -> None:
    """The first worked episode must be one (BadInput)."""
    next(islice(episodes(family, family.problems(1, seed + 1, held_out=False), environment, seed), 1))


def played(name: str, problem: Problem, turns: list[Trace], where: str) -> Chat:
    """The chat in which the model says these turns. BadInput if the environment is over before the last of them, or not over with it."""
    environment = environments.get(name)()
    prompt = opening(environment.reset(problem))
    messages: list[dict[str, Any]] = []
    most = getattr(environment, "turns", TURNS)
    if not 0 < len(turns) <= most:
        raise BadInput(f"{where}: environment '{name}' has {most} turns at most, and the worked episode {len(turns)}.")
    for number, turn in enumerate(turns, 1):
        messages.append({"role": "assistant", "reasoning_content": turn.thought, "content": turn.answer})
        try:
            seen = environment.step(turn.answer)
        except BadInput:
            raise
        except Exception as error:  # of a user's environment
            raise BadInput(f"{where}: environment '{name}' raised {type(error).__name__}: {error}") from error
        if seen.done != (number == len(turns)):
            over = "is over" if seen.done else "is not over"
            raise BadInput(f"{where}: environment '{name}' {over} with turn {number} of the {len(turns)} of the worked episode.")
        if not seen.done:
            messages.append({"role": "user", "content": seen.text})
    return Chat([*prompt, *messages], where, len(prompt), tuple(getattr(environment, "stop", ())))
