"""Verdicts on what a model answered: by the puzzle itself, or by the verifier that a problem names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.errors import BadInput
from pascaline.post.verifiers.base import RIGHT, Scores, closed, get, written

if TYPE_CHECKING:  # the processes of the pool load this room, and have no use for torch
    from pascaline.engine import Output

__all__ = ["Judged", "closed", "get", "judge", "scores", "written"]


@dataclass
class Judged:
    """Verdicts, one list a problem, one entry a sample; and why the first answer that has none could not be judged."""

    verdicts: list[list[Verdict]]
    trouble: str = ""


def judge(problems: Sequence[Problem], outputs: Sequence[Sequence[Output]]) -> Judged:
    """Judge the answers to each problem; those of one verifier in one call.

    What was cut off, by the length limit or within the thought, was not said and is wrong, whatever a verifier would find in it. A model
    that does not think is judged by all it said.
    """
    verdicts = [[Verdict.WRONG] * len(group) for group in outputs]
    waiting: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, (problem, group) in enumerate(zip(problems, outputs, strict=True)):
        for j, output in enumerate(group):
            if output.finish_reason != "stop" or not closed(output):
                continue
            if problem.verifier:
                waiting[problem.verifier].append((i, j))
            else:
                verdicts[i][j] = puzzles.get(problem.puzzle).verify(problem, output.text)
    trouble = ""
    for name, places in waiting.items():
        found, why = scores(name, [problems[i] for i, _ in places], [outputs[i][j] for i, j in places])
        trouble = trouble or why
        for (i, j), score in zip(places, found, strict=True):
            verdicts[i][j] = Verdict.UNJUDGED if score is None else Verdict.RIGHT if score >= RIGHT else Verdict.WRONG
    return Judged(verdicts, trouble)


def scores(name: str, problems: Sequence[Problem], outputs: Sequence[Output]) -> tuple[Scores, str]:
    """What the verifier gives each output for its problem, and why it gave none to the first that has none ("" if all have one).

    A verifier that raises is asked again answer by answer, so that one it breaks on costs the others nothing. Problems of different
    columns are asked for apart.
    """
    found: Scores = [None] * len(problems)
    trouble = ""
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, problem in enumerate(problems):
        alike[tuple(problem.data)].append(i)
    for places in alike.values():
        given, why = _asked(name, [problems[i] for i in places], [outputs[i] for i in places])
        trouble = trouble or why
        for i, score in zip(places, given, strict=True):
            found[i] = score
    return found, trouble


def _asked(name: str, problems: Sequence[Problem], outputs: Sequence[Output]) -> tuple[Scores, str]:
    verifier = get(name)
    columns = {key: [p.data[key] for p in problems] for key in problems[0].data}
    try:
        found = verifier(
            prompts=[p.prompt for p in problems],
            completions=[written(o) for o in outputs],
            completion_ids=[o.token_ids for o in outputs],
            **columns,
        )
        found = [None if score is None or math.isnan(score) else float(score) for score in found]
    except BadInput:  # of the recipe or the data: no answer is at fault
        raise
    except Exception as error:  # of a user's verifier, or of one that an answer broke
        if len(problems) > 1:
            pairs = [_asked(name, [p], [o]) for p, o in zip(problems, outputs, strict=True)]
            return [scores[0] for scores, _ in pairs], next((why for _, why in pairs if why), "")
        return [None], f"verifier '{name}' raised {type(error).__name__}: {error}"
    if len(found) != len(problems):
        raise BadInput(f"verifier '{name}' gave {len(found)} scores for {len(problems)} completions; it must give one each, or None.")
    return found, f"verifier '{name}' gave no score" if None in found else ""
