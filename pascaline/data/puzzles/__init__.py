"""Puzzles whose answers can be checked: the raw material of reasoning traces and of reinforcement learning.

A puzzle is a module with LEVELS, generate, trace, solve and verify (see base.Puzzle). Others can be added through
the entry-point group `pascaline.puzzles` or named as `module:function`. One that has GRADED, attempt, check and review besides
(base.Gradable) is a puzzle once more as `grade:PUZZLE`: to grade attempts at it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, cast

from pascaline import plugins
from pascaline.data.puzzles import arithmetic, chain, countdown, grade, gym, needle
from pascaline.data.puzzles.base import Dial, Problem, Puzzle, Trace, Verdict
from pascaline.errors import BadInput

__all__ = ["BUILT_IN", "Dial", "Problem", "Puzzle", "Trace", "Verdict", "draw", "get", "held_out", "problems"]

BUILT_IN: dict[str, Puzzle] = {
    "countdown": cast(Puzzle, countdown),
    "chain": cast(Puzzle, chain),
    "arithmetic": cast(Puzzle, arithmetic),
    "needle": cast(Puzzle, needle),
}
GROUP = "pascaline.puzzles"
HELD_OUT_ONE_IN = 8
PATIENCE = 50_000  # draws in a row that bring nothing new before a space counts as exhausted


@lru_cache(maxsize=64)
def get(name: str) -> Puzzle:
    """The puzzle of this name: built in, a family of reasoning-gym's (`gym:FAMILY`), the grading of attempts at another (`grade:PUZZLE`),
    installed by a plugin, or at `module:function`.

    What a path or an entry point names is the puzzle itself, or a function or class that returns it when called
    without arguments. Raises BadInput for an unknown name or an object that lacks a puzzle's parts.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.startswith(gym.PREFIX):
        return cast(Puzzle, gym.get(name))
    if name.startswith(grade.PREFIX):
        return cast(Puzzle, grade.get(name))
    found = plugins.load("puzzle", name, GROUP, BUILT_IN, lambda named: named() if callable(named) else named)
    missing = [part for part in ("generate", "trace", "solve", "verify") if not callable(getattr(found, part, None))]
    if missing:
        raise BadInput(f"puzzle '{name}' lacks {', '.join(missing)}; a puzzle has generate, trace, solve and verify")
    return cast(Puzzle, found)


def held_out(key: str) -> bool:
    """Whether the problem of this key belongs to evaluation for ever: 1 in 8, by the key's hash alone."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % HELD_OUT_ONE_IN == 0


_is_held_out = held_out  # below, `held_out` is also the name of an argument


def draw(name: str, seed: int, held_out: bool, **dials: Any) -> Iterator[Problem]:
    """An endless, deterministic stream of problems of one side of the split; a problem may come again.

    Raises BadInput when the dials leave no problem on that side.
    """
    puzzle, side = get(name), "held-out" if held_out else "training"
    rng = random.Random(f"{name} {seed} {side}")
    misses = 0
    while misses < PATIENCE:
        problem = puzzle.generate(rng, **dials)
        if _is_held_out(problem.key) == held_out:
            misses = 0
            yield problem if problem.puzzle == name else replace(problem, puzzle=name)
        else:
            misses += 1
    raise BadInput(f"puzzle '{name}' with {dials or 'its default dials'} has no {side} problem; turn the dials up")


def problems(name: str, count: int, seed: int, held_out: bool, **dials: Any) -> list[Problem]:
    """`count` problems of one side of the split, the same for the same arguments; a longer list begins like a shorter.

    Held-out problems are all different (equal ones would count twice in an evaluation); training draws may repeat.
    Raises BadInput when there are fewer different held-out problems than asked for.
    """
    found: list[Problem] = []
    keys: set[str] = set()
    repeats = 0
    for problem in draw(name, seed, held_out, **dials) if count > 0 else ():
        repeats = repeats + 1 if held_out and problem.key in keys else 0
        if not repeats:
            keys.add(problem.key)
            found.append(problem)
        if len(found) == count:
            break
        if repeats * HELD_OUT_ONE_IN > PATIENCE:
            raise BadInput(
                f"puzzle '{name}' with {dials or 'its default dials'} has only about {len(found)} held-out "
                f"problems, {count} were asked for; ask for fewer or turn the dials up"
            )
    return found
