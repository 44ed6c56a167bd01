"""What every verifier speaks, and by which name it is found.

A verifier has TRL's reward signature: f(prompts, completions, completion_ids, **columns) -> list[float | None]. All arguments are lists
with one entry a completion; the columns are those of the problem (Problem.data). A score of RIGHT or more is right, anything less is
wrong, and None means that it could not judge. A completion is the whole text, `<think>thought</think>answer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pascaline import plugins
from pascaline.errors import BadInput
from pascaline.tokenizer import THINK, UNTHINK

if TYPE_CHECKING:  # the processes of the pool load this room, and have no use for torch
    from pascaline.engine import Output

Scores = list[float | None]
Verifier = Callable[..., Scores]

RIGHT = 0.99  # several scorers of others give partial credit, and rounding must not cost a right answer its point
GROUP = "pascaline.verifiers"
ROOM = "pascaline.post.verifiers"
BUILT_IN: dict[str, str] = {
    "integer": f"{ROOM}.numbers:integer",
    "expression": f"{ROOM}.numbers:expression",
    "math": f"{ROOM}.mathematics:math",
    "code": f"{ROOM}.code:code",
    "gym": f"{ROOM}.gym:gym",
    "instructions": f"{ROOM}.instructions:instructions",
    "format": f"{ROOM}.style:one_thought",
    "language": f"{ROOM}.style:language",
}


def written(output: Output) -> str:
    """A completion as a verifier reads it."""
    if output.reasoning is None:
        return output.text
    return f"{THINK}{output.reasoning}{UNTHINK if closed(output) else ''}{output.text}"


def closed(output: Output) -> bool:
    """Whether there is an answer behind the thought; one that was never closed has none."""
    return output.reasoning is None or output.text != ""


def split(completion: str) -> tuple[str | None, str | None]:
    """(thought, answer) of a completion; the thought is None where there is none, the answer None where the thought is not closed."""
    if not completion.startswith(THINK):
        return None, completion
    thought, tag, answer = completion[len(THINK) :].partition(UNTHINK)
    return thought, answer if tag else None


@lru_cache(maxsize=64)
def get(name: str) -> Verifier:
    """The verifier of this name: built in, installed by a plugin (entry-point group pascaline.verifiers), or at `module:function`.
    BadInput for an unknown name, for one whose extra is not installed, and for what cannot be called."""
    found: Verifier = plugins.load("verifier", name, GROUP, BUILT_IN)
    if not callable(found):
        raise BadInput(f"verifier '{name}' is no function, but {type(found).__name__}.")
    return found


def answers(completions: Sequence[str]) -> list[str | None]:
    """Their answers, without thoughts; None where a thought is not closed, which is no answer."""
    return [split(completion)[1] for completion in completions]


def column(columns: dict[str, Any], verifier: str, *names: str) -> Sequence[Any]:
    """The first of the named columns that there is; BadInput if there is none."""
    for name in names:
        if name in columns:
            return columns[name]
    raise BadInput(f"verifier '{verifier}' needs a column {' or '.join(names)}; the problems have {', '.join(columns) or 'none'}.")
