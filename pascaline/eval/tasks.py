"""Held-out problems put to a model, and what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Engine, Output, Sampling
from pascaline.eval import passk
from pascaline.recipe import Puzzle

Judge = Callable[[Problem, Output], Verdict]


@dataclass
class Result:
    """Outputs and verdicts, one list a problem, one entry a sample."""

    problems: list[Problem]
    outputs: list[list[Output]]
    verdicts: list[list[Verdict]]

    @property
    def right(self) -> np.ndarray:
        """[problems, samples] bool."""
        return np.array([[v is Verdict.RIGHT for v in row] for row in self.verdicts])

    def summary(self) -> dict[str, Any]:
        """pass@1 with its 95 % interval (problems are the clusters) and how the answers look. An answer that ran into the limit is
        `truncated`; one that was finished, wrong and not given up is a `false_claim`."""
        accuracy, low, high = passk.mean_interval(self.right.mean(1))
        pairs = [(o, v) for outs, row in zip(self.outputs, self.verdicts, strict=True) for o, v in zip(outs, row, strict=True)]
        cut = np.array([o.finish_reason == "length" for o, _ in pairs])
        return {
            "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "n": len(self.problems),
            "mean_tokens": float(np.mean([len(o.token_ids) for o, _ in pairs])),
            "abstain": float(np.mean([v is Verdict.ABSTAIN for _, v in pairs])),
            "false_claim": float(np.mean([v is Verdict.WRONG for _, v in pairs] & ~cut)),
            "truncated": float(cut.mean()),
        }  # fmt: skip

    def votes(self, counts: Sequence[int]) -> tuple[list[float], list[float]]:
        """Accuracy of the majority vote, and of best-of-k with the puzzle's own verifier as the judge (which is pass@k), for each k.
        Who gives up, is cut off or says nothing has no vote."""
        answers = [
            [
                (o.text.strip() or None) if v is not Verdict.ABSTAIN and o.finish_reason == "stop" else None
                for o, v in zip(outs, row, strict=True)
            ]
            for outs, row in zip(self.outputs, self.verdicts, strict=True)
        ]
        right = self.right
        best = [float(passk.pass_at_k(right.shape[1], right.sum(1), k).mean()) for k in counts]
        return [passk.majority(answers, right.tolist(), k) for k in counts], best


def held_out(names: Sequence[str], tables: dict[str, Puzzle], count: int, seed: int) -> dict[str, list[Problem]]:
    """The evaluation problems of each puzzle: distinct, from the side of the split that no training stage may draw from."""
    return {name: puzzles.problems(name, count, seed, held_out=True, **tables[name].dials) for name in names}


def evaluate(
    engine: Engine, problems: list[Problem], sampling: Sampling, judge: Judge, prompt: Callable[[Problem], Any] = lambda p: p.prompt
) -> Result:
    outputs = engine.generate([prompt(p) for p in problems], sampling)
    return Result(problems, outputs, [[judge(p, o) for o in group] for p, group in zip(problems, outputs, strict=True)])
