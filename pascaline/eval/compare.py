"""Models beside each other on one suite: paired problem by problem, what was gained and what was lost, and without each task in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pascaline.errors import BadInput
from pascaline.eval import passk
from pascaline.recipe import differences
from pascaline.runs import plain

HALF = 0.5  # a problem counts as solved where more than so many of its samples are right
Model = Mapping[str, Any]


def compare(models: Sequence[Model], each_to_the_one_before: bool = False) -> dict[str, Any]:
    """{"pairs": [...], "without": ...} of the models of a result, in their order: every one against the first, or against the one before.

    BadInput where two of them were asked different problems in a task of the same name.
    """
    pairs = [pair(models[i - 1 if each_to_the_one_before else 0], models[i]) for i in range(1, len(models))]
    return plain({"pairs": pairs, "without": leave_one_out(models)})


def pair(before: Model, after: Model) -> dict[str, Any]:
    """{"before", "after", "tasks": rows, most lost first, "missing": tasks that only one of them has}."""
    mine, other = before["tasks"], after["tasks"]
    shared = [label for label in mine if label in other]
    if not shared:
        raise BadInput(f"{before['name']} and {after['name']} have no task in common ({', '.join(mine)}; {', '.join(other)}).")
    rows = [_row(label, mine[label], other[label], before["name"], after["name"]) for label in shared]
    rows.sort(key=lambda row: (-row["lost_share"], row["task"]))
    missing = [label for label in [*mine, *other] if label not in shared]
    return {"before": before["name"], "after": after["name"], "tasks": rows, "missing": missing}


def _row(label: str, before: Mapping[str, Any], after: Mapping[str, Any], first: str, second: str) -> dict[str, Any]:
    """One task: the difference after - before with its interval, and the problems gained and lost with the sign test's p. asked: settings
    in which the two were asked otherwise."""
    _refuse_unpaired(label, before, after, first, second)
    lower, bounded = before["better"] == "lower", before.get("unit", "share") == "share"
    known = [t for t in zip(before["keys"], before["values"], after["values"], strict=True) if None not in t]
    olds, news = [t[1] for t in known], [t[2] for t in known]
    gain, low, high = passk.paired_difference(news, olds, bounded) if known else (None, None, None)
    # A share is solved or not; of other values it counts whether they became better.
    changes = [_change(old, new, lower, bounded) for old, new in zip(olds, news, strict=True)]
    gained, lost = changes.count(1), changes.count(-1)
    asked = [key for key in differences(before.get("plan") or {}, after.get("plan") or {}) if key not in ("name", "sha256")]
    return {
        "task": label, "better": before["better"], "unit": before.get("unit", "share"), "n": len(known),
        "before": _mean(olds), "after": _mean(news), "difference": gain, "low": low, "high": high,
        "gained": gained, "lost": lost, "gained_share": gained / max(len(known), 1), "lost_share": lost / max(len(known), 1),
        "p": sign_test(gained, lost), "asked": asked,
        "lost_keys": [t[0] for t, change in zip(known, changes, strict=True) if change < 0],
        "gained_keys": [t[0] for t, change in zip(known, changes, strict=True) if change > 0],
    }  # fmt: skip


def _refuse_unpaired(label: str, before: Mapping[str, Any], after: Mapping[str, Any], first: str, second: str) -> None:
    if before["keys"] == after["keys"] and before["better"] == after["better"] and before.get("unit") == after.get("unit"):
        return
    ours, theirs = before["keys"], after["keys"]
    changed = differences(before.get("plan") or {}, after.get("plan") or {})
    why = f"settings that differ: {', '.join(changed)}" if changed else "with the same settings, so that the task itself has changed"
    raise BadInput(
        f"task {label}: {first} and {second} were not asked the same problems ({len(ours)} and {len(theirs)}, "
        f"{len(set(ours) & set(theirs))} of them in both; {why}), so that they cannot be compared."
    )


def _change(old: float, new: float, lower: bool, bounded: bool) -> int:
    """1: gained, -1: lost, 0: as it was."""
    change = (new > HALF) - (old > HALF) if bounded else (new > old) - (new < old)
    return -change if lower else change


def sign_test(gained: int, lost: int) -> float:
    """How often chance alone would part gained + lost changes at least so unevenly: the exact two-sided p (McNemar's test, exact form)."""
    changes, least = gained + lost, min(gained, lost)
    below = sum(math.comb(changes, i) for i in range(least + 1))
    return min(1.0, 2 * below / 2**changes)


def leave_one_out(models: Sequence[Model]) -> dict[str, Any] | None:
    """The mean of each model over the tasks that all of them have, with all of these and without each in turn. None where there are no two.

    {"names", "tasks", "left_out": tasks that no mean has, for less is better there or their values are no shares, "rows": [{"without":
    a task or None, "means", "ranks", "changes": whether the ranks are others than with all tasks}]}"""
    shared = [label for label in models[0]["tasks"] if all(label in m["tasks"] for m in models)] if models else []
    tasks = [label for label in shared if all(_counts(m["tasks"][label]) for m in models)]
    if len(tasks) < 2:
        return None
    rows: list[dict[str, Any]] = []
    for without in (None, *tasks):
        means = [_mean([m["tasks"][label]["score"] for label in tasks if label != without]) for m in models]
        ranks = [1 + sum(other > mean for other in means) for mean in means]  # type: ignore[operator]
        rows.append({"without": without, "means": means, "ranks": ranks, "changes": bool(rows) and ranks != rows[0]["ranks"]})
    return {"names": [m["name"] for m in models], "tasks": tasks, "left_out": [t for t in shared if t not in tasks], "rows": rows}


def _counts(task: Mapping[str, Any]) -> bool:
    return task["better"] == "higher" and task.get("unit", "share") == "share" and task["score"] is not None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
