"""Mathematical answers, by math-verify (extra `math`) in processes that can be killed."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from pascaline.errors import BadInput
from pascaline.post.verifiers import pool
from pascaline.post.verifiers.base import Scores, answers, column

SAME = "pascaline.post.verifiers.latex:same"
SECONDS = 5.0  # for one answer


def math(prompts: Sequence[Any], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> Scores:
    """1.0 where the answer is the same expression as the gold one (column answer, solution, ground_truth or label), 0.0 where it is another
    or cannot be read, None where that took longer than SECONDS or killed the process.

    latex.py says where in its text an answer is looked for. BadInput for a gold answer that cannot be read.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise BadInput("verifier 'math' needs math-verify: pip install pascaline[math]")
    golds = [_gold(gold) for gold in column(columns, "math", "answer", "solution", "ground_truth", "label")]
    said = answers(completions)
    places = [i for i, answer in enumerate(said) if answer is not None]
    scores: Scores = [0.0] * len(said)  # a thought that was never closed is no answer
    for i, found in zip(places, pool.shared(SECONDS).map(SAME, [[golds[i], said[i]] for i in places]), strict=True):
        if found is None:
            raise BadInput(f"verifier 'math' cannot read the gold answer '{golds[i][:200]}'; it should be one expression.")
        scores[i] = None if isinstance(found, pool.Failure) else float(found)
    return scores


def _gold(gold: Any) -> str:
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise BadInput(f"verifier 'math' needs gold answers that are texts or numbers, not {type(gold).__name__}: {str(gold)[:200]}")
    return str(gold)
