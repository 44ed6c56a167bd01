"""Environments: what a policy acts in for more than one turn, with tools or in a game.

Built in are `calculator` and `python`; others come through the entry-point group `pascaline.environments` or are named as
`module:function`. How an episode is played, token for token: episode.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import cast

from pascaline import plugins
from pascaline.errors import BadInput
from pascaline.post.environments.base import Environment, Observation, Refused, Tool
from pascaline.post.environments.calculator import Calculator
from pascaline.post.environments.python import Python

__all__ = ["BUILT_IN", "Environment", "Observation", "Refused", "Tool", "get", "stops"]

BUILT_IN: dict[str, Callable[[], Environment]] = {"calculator": Calculator, "python": Python}
GROUP = "pascaline.environments"


@lru_cache(maxsize=64)
def get(name: str) -> Callable[[], Environment]:
    """What makes an environment of this name, a new one for each episode: built in, installed by a plugin, or at `module:function` (a
    function or class that is called without arguments). BadInput for an unknown name or for what makes no environment."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    found, made = plugins.load("environment", name, GROUP, BUILT_IN, lambda named: (named, named() if callable(named) else None))
    missing = [part for part in ("reset", "step") if not callable(getattr(made, part, None))]
    if missing:
        raise BadInput(f"environment '{name}' must be a function or class that gives, called without arguments, an object with reset and "
                       f"step; it lacks {' and '.join(missing)}.")  # fmt: skip
    return cast(Callable[[], Environment], found)


def stops(name: str) -> list[str]:
    """The strings that end a turn in this environment."""
    return list(getattr(get(name)(), "stop", ()))
