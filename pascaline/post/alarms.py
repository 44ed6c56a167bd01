"""What goes wrong in reinforcement while its loss looks fine, each with the advice of those whom it happened to.

An alarm follows from the rows of metrics.jsonl alone, so that a run that is resumed hears the same. docs/post-training.md says how to read
them.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pascaline.tables import Rl

Rows = Sequence[Mapping[str, Any]]
LOOKED_AT = ("entropy", "response_tokens", "truncated", "flat_groups", "all_right", "none_right", "refilled", "unjudged", "gap_max",
             "rollout_tokens")  # fmt: skip
GAP, GAP_BFLOAT16 = 1e-4, 1.0  # the first is the design's law 1


class Alarms:
    """Judges the rows of the stage `name` as they come (train/metrics.py, Watch)."""

    def __init__(self, name: str, rl: Rl, exact: bool = True):
        """exact: the run computes in float32, so that engine and trainer have to agree."""
        self.name, self.rl = name, rl
        self.gap = rl.alarms.gap or (GAP if exact else GAP_BFLOAT16)
        self.rows: list[dict[str, Any]] = []  # only LOOKED_AT, so that a long run's fit into memory
        self.told = set[str]()

    def begin(self, rows: list[dict[str, Any]]) -> None:
        self.rows = [_looked_at(row) for row in rows]
        self.told = {name for row in rows for name in row.get("alarms", ())}

    def look(self, row: dict[str, Any]) -> tuple[list[str], list[str], str]:
        self.rows.append(_looked_at(row))
        found = firing(self.rows, self.name, self.rl, self.gap)
        stop = self.rl.alarms.stop
        ending = [name for name in found if stop is True or (stop and name in stop)]
        fresh = [text for name, text in found.items() if name not in self.told and name not in ending[:1]]
        self.told |= found.keys()
        return list(found), fresh, self._end(found[ending[0]]) if ending else ""

    def _end(self, text: str) -> str:
        return (
            f"{text} The run stops here because {self.name}.alarms.stop asks for it; the same command goes on from the last checkpoint, "
            f"and past this with --set {self.name}.alarms.stop=false."
        )


def firing(rows: Rows, name: str, rl: Rl, gap: float) -> dict[str, str]:
    """The alarms that the last of these rows of stage `name` gives: alarm -> what it means and what to change."""
    found = {
        "entropy": _entropy(rows, name, rl),
        "length": _length(rows, name, rl),
        "flat": _flat(rows, name, rl),
        "unjudged": _unjudged(rows, name, rl),
        "gap": _gap(rows, gap),
    }
    return {alarm: text for alarm, text in found.items() if text}


def _entropy(rows: Rows, name: str, rl: Rl) -> str:
    window = rl.alarms.window
    if len(rows) < 2 * window:
        return ""
    first, now = mean(rows[:window], "entropy"), mean(rows[-window:], "entropy")
    if not now < rl.alarms.entropy * first:  # also where either is not known
        return ""
    return (
        f"the policy's entropy has collapsed to {now:.2g} nats a token, {now / first:.1%} of what it began with. A group's answers are "
        "nearly the same then, and nothing new is tried. If the accuracy is near 1, take harder problems; else raise "
        f"{name}.clip_high, lower {name}.lr, or hold the policy with {name}.kl."
    )


def _length(rows: Rows, name: str, rl: Rl) -> str:
    window, limit = rl.alarms.window, rl.max_tokens
    if len(rows) < window:
        return ""
    now, cut = (mean(rows[-window:], key) for key in ("response_tokens", "truncated"))
    before = mean(rows[-2 * window : -window], "response_tokens")
    if cut > rl.alarms.truncated:
        what = f"{cut:.0%} of the answers are cut off at {limit} tokens"
    elif now > rl.alarms.length * limit and now > before:
        what = f"the answers have grown to {now:.0f} of {limit} tokens and go on growing"
    else:
        return ""
    return (
        f"{what}. What is cut off earns nothing, however good it was. If right answers need the room, raise {name}.max_tokens; if it is "
        f"the wrong ones that are long, set {name}.overlong = 0.2 or {name}.average = 'limit'."
    )


def _flat(rows: Rows, name: str, rl: Rl) -> str:
    steps = rl.alarms.flat
    recent = rows[-steps * rl.minibatches * rl.epochs :] if steps else []
    last = [row for row in recent if "flat_groups" in row]  # the first of each rollout's optimizer steps
    if not last or len(last) < steps or not all(row.get("flat_groups") == 1 and not row.get("refilled") for row in last):
        return ""
    if all(row.get("none_right") == 1 for row in last):
        return (
            f"not one answer was right in {steps} steps, so nothing is learnt. Read {name}'s traces.jsonl: if the answers look right, the "
            "verifier or their form is wrong; else take easier problems, or teach more of them by sft first."
        )
    if all(row.get("all_right") == 1 for row in last):
        return f"every answer was right in {steps} steps, so nothing is left to learn here. Take harder problems, or end {name} earlier."
    return (
        f"in {steps} steps no group had a right and a wrong answer, so nothing is learnt. Raise {name}.samples or {name}.prompts, or take "
        "problems of a difficulty between these."
    )


def _unjudged(rows: Rows, name: str, rl: Rl) -> str:
    window = rl.alarms.window
    share = mean(rows[-window:], "unjudged")
    if len(rows) < window or not share > rl.alarms.unjudged:
        return ""
    return (
        f"{share:.1%} of the answers could not be judged in {window} steps. They are left out, and if they are the hard ones, what is "
        f"learnt leans to the easy ones. Mend the verifier or give it more time (docs/verifiers.md); above {name}.max_unjudged = "
        f"{rl.max_unjudged:g} in one step the run stops."
    )


def _gap(rows: Rows, limit: float) -> str:
    worst = rows[-1].get("gap_max")
    # Where no rollout was made, the samples are older than the weights, and then the two may differ.
    if worst is None or not rows[-1].get("rollout_tokens") or worst <= limit:
        return ""
    return (
        f"the trainer's log-probability of a sampled token is {worst:.2g} from the engine's, more than {limit:g}: they are no longer one "
        "model, and the gradient is of another policy than the one that sampled. In bfloat16 rounding does some of this, so try dtype = "
        "'float32'; in float32 it is a fault of this program: please report it with the recipe."
    )


def mean(rows: Rows, key: str) -> float:
    """Of the rows that have it as a finite number; NaN if none has."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    return fmean(values) if values else math.nan


def _looked_at(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in LOOKED_AT if key in row}
