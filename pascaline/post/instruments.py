"""What reinforcement is watched by: the numbers of a step, where its time went, and a few answers to read.

Shapes: G groups (prompts), n answers a group.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.post.environments.episode import thoughts
from pascaline.runs import Metrics, disk_full

TRACES = "traces.jsonl"  # in the stage's folder
PARTS = 10  # of a run; at the end of each, and at its start, a group is kept
ANSWERS = 3  # of that group, at most


class Clock:
    """`with clock("rollout"): ...` as often as need be; `taken` are the seconds since it was last asked."""

    def __init__(self) -> None:
        self._seconds = Counter[str]()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - began  # type: ignore[assignment]

    def taken(self) -> dict[str, float]:
        """{"rollout_seconds": ..., "verify_seconds": ..., ...}"""
        found = {f"{what}_seconds": float(seconds) for what, seconds in self._seconds.items()}
        self._seconds.clear()
        return {"rollout_seconds": 0.0, "verify_seconds": 0.0, **found}


def facts(
    outputs: Sequence[Sequence[Output]],
    verdicts: Sequence[Sequence[Verdict]],
    reward_Gn: np.ndarray,
    known_Gn: np.ndarray,
    flat_G: np.ndarray,
) -> dict[str, float | None]:
    """Of all answers of a step: the mean reward of those that were judged (`known_Gn`), shares of verdicts, lengths; and the shares of
    groups that teach nothing. accuracy, wrong, abstain and unjudged add up to 1.

    An answer that was cut off is wrong, but not a false claim. A mean over no answers is None.
    """
    lengths = np.array([[len(o.token_ids) for o in group] for group in outputs])
    cut = np.array([[o.finish_reason == "length" for o in group] for group in outputs])
    is_ = {verdict: np.array([[v is verdict for v in group] for group in verdicts]) for verdict in Verdict}
    right = flat_G & (is_[Verdict.RIGHT] & known_Gn).any(1)
    told = {
        "reward": _mean(reward_Gn[known_Gn]) or 0.0,
        "flat_groups": flat_G.mean(),
        "all_right": right.mean(),
        "none_right": (flat_G & ~right).mean(),
        "response_tokens": lengths.mean(),
        "tokens_right": _mean(lengths[is_[Verdict.RIGHT]]),
        "tokens_wrong": _mean(lengths[is_[Verdict.WRONG]]),
        "truncated": cut.mean(),
        "accuracy": is_[Verdict.RIGHT].mean(),
        "wrong": is_[Verdict.WRONG].mean(),
        "false_claim": (is_[Verdict.WRONG] & ~cut).mean(),
        "abstain": is_[Verdict.ABSTAIN].mean(),
        "unjudged": 1 - known_Gn.mean(),
    }
    return {name: None if value is None else float(value) for name, value in told.items()}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


class Traces:
    """traces.jsonl: of the first step, of one in every tenth of `steps`, and of the last, a group's prompt and up to ANSWERS answers."""

    def __init__(self, path: Path, steps: int):
        self.file = Metrics(path)
        self.steps = {round(part * (steps - 1) / PARTS) for part in range(PARTS + 1)}
        self.begun = False

    def keep(
        self,
        step: int,
        problems: Sequence[Problem],
        outputs: Sequence[Sequence[Output]],
        verdicts: Sequence[Sequence[Verdict]],
        reward_Gn: np.ndarray,
        flat_G: np.ndarray,
    ) -> None:
        """Write the step's line if it is one of those. The first call says where a resumed run goes on: what was written after it goes."""
        if not self.begun:
            self.file.truncate_after(step - 1)
            self.begun = True
        if step not in self.steps:
            return
        g = int(np.flatnonzero(~flat_G)[0]) if not flat_G.all() else 0  # one that teaches, where there is one
        firsts = {verdict: i for i, verdict in reversed(list(enumerate(verdicts[g])))}  # of each verdict the first answer
        order = sorted(firsts.values()) + [i for i in range(len(outputs[g])) if i not in firsts.values()]
        said = [
            {
                "thought": thoughts(outputs[g][i]),
                "answer": outputs[g][i].text,
                "verdict": verdicts[g][i].value,
                "reward": float(reward_Gn[g, i]),
                "tokens": len(outputs[g][i].token_ids),
                "cut": outputs[g][i].finish_reason == "length",
            }
            for i in sorted(order[:ANSWERS])
        ]
        try:
            self.file.append({"step": step, "puzzle": problems[g].puzzle, "prompt": problems[g].prompt, "answers": said})
        except OSError as e:
            if not disk_full(e):  # then the run goes on without, as metrics and checkpoints let it
                raise
        finally:
            self.file.close()
