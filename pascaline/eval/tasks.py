"""Held-out problems put to a model, and what comes of it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pascaline.data.puzzles import Problem, Verdict
from pascaline.data.puzzles.families import Family
from pascaline.engine import Engine, Output, Sampling
from pascaline.eval import passk
from pascaline.post.verifiers import Judged, closed, judge
from pascaline.tables import Puzzle

Judge = Callable[[Sequence[Problem], Sequence[Sequence[Output]]], Judged]
Read = Callable[[Problem, str], Hashable | None]


def said(problem: Problem, text: str) -> str | None:
    """An answer as it is counted in a vote: its text; None for one that says nothing."""
    return text.strip() or None


@dataclass
class Result:
    """Outputs and verdicts, one list a problem, one entry a sample; trouble: why the first answer without a verdict has none.

    What could not be judged says nothing of the model: it counts in no mean of right and wrong, but is told apart.
    """

    problems: list[Problem]
    outputs: list[list[Output]]
    verdicts: list[list[Verdict]]
    trouble: str = ""

    @property
    def right(self) -> np.ndarray:
        """[problems, samples] bool."""
        return np.array([[v is Verdict.RIGHT for v in row] for row in self.verdicts])

    @property
    def judged(self) -> np.ndarray:
        """[problems, samples] bool."""
        return np.array([[v is not Verdict.UNJUDGED for v in row] for row in self.verdicts])

    @property
    def means(self) -> list[float | None]:
        """Of each problem, the share of the judged answers that is right; None where none was judged."""
        return [float(r[j].mean()) if j.any() else None for r, j in zip(self.right, self.judged, strict=True)]

    def summary(self) -> dict[str, Any]:
        """pass@1 with its 95 % interval (problems are the clusters) and how the answers look, as shares of all. An answer that ran into
        the limit is `truncated`; one that was finished, wrong and not given up is a `false_claim`; one whose thought was never closed,
        cut off or not, is `unclosed`."""
        known = [mean for mean in self.means if mean is not None]
        accuracy, low, high = passk.mean_interval(known) if known else (None, None, None)
        pairs = [(o, v) for outs, row in zip(self.outputs, self.verdicts, strict=True) for o, v in zip(outs, row, strict=True)]
        cut = np.array([o.finish_reason == "length" for o, _ in pairs])
        return {
            "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "n": len(known),
            "mean_tokens": float(np.mean([len(o.token_ids) for o, _ in pairs])),
            "abstain": float(np.mean([v is Verdict.ABSTAIN for _, v in pairs])),
            "false_claim": float(np.mean([v is Verdict.WRONG for _, v in pairs] & ~cut)),
            "truncated": float(cut.mean()), "unclosed": float(np.mean([not closed(o) for o, _ in pairs])),
            "unjudged": float(1 - self.judged.mean()),
        }  # fmt: skip

    def ballots(self, read: Read = said) -> list[list[Hashable | None]]:
        """What each answer votes for. Who gives up, is cut off, says nothing or cannot be judged has no vote (None)."""
        votes = (Verdict.RIGHT, Verdict.WRONG)
        return [
            [read(p, o.text) if v in votes and o.finish_reason == "stop" else None for o, v in zip(outs, row, strict=True)]
            for p, outs, row in zip(self.problems, self.outputs, self.verdicts, strict=True)
        ]

    def votes(self, counts: Sequence[int]) -> tuple[list[float], list[float]]:
        """Accuracy of the majority vote, and of best-of-k with the puzzle's own verifier as the judge (which is pass@k), for each k.
        Problems with fewer judged answers than the largest k are left out of best-of-k."""
        answers, right, drawn = self.ballots(), self.right, self.judged.sum(1)
        enough = drawn >= max(counts)
        best = [float(passk.pass_at_k(drawn[enough], right.sum(1)[enough], k).mean()) if enough.any() else float("nan") for k in counts]
        return [passk.majority(answers, right.tolist(), k) for k in counts], best


def held_out(names: Sequence[str], tables: dict[str, Puzzle], count: int, seed: int) -> dict[str, list[Problem]]:
    """The evaluation problems of each puzzle: distinct, from the side of the split that no training stage may draw from."""
    return {name: Family(name, tables[name]).problems(count, seed, held_out=True) for name in names}


def evaluate(
    engine: Engine, problems: list[Problem], sampling: Sampling, judge: Judge = judge, prompt: Callable[[Problem], Any] = lambda p: p.prompt
) -> Result:
    outputs = engine.generate([prompt(p) for p in problems], sampling)
    judged = judge(problems, outputs)
    return Result(problems, outputs, judged.verdicts, judged.trouble)
