"""What graders are worth, as rows of text for a terminal and a page. It only reads report.json."""

from collections.abc import Mapping
from typing import Any

from pascaline.eval.forms import NONE, absent, between, count, percent, points

NOTE = (
    "Grades of {what}. grade: exactly what the puzzle finds, with its 95% interval; verdict: right about whether there is a fault; fault "
    "real: of the attempts with a fault, those where the one that is named is real; faultless: attempts without one, which the word right "
    "for all would earn; Brier: mean square error of the probability of right (less is better); no grade: cut off, or no room."
)
QUALITY = ["attempts", "grade", "95% interval", "verdict", "fault real", "faultless", "Brier", "no grade"]
BEST = ["pass@1", "k", "best of k", "m", "majority", "tokens", "best - majority", "best - pass@1", "majority - pass@1"]


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """How to read it, and a head with a row each: graders on the puzzle's own attempts, the best of n by their grades, and their grades of
    the models' answers. [] in a chain without a grader."""
    found = report.get("grading") or {}
    graders, rows = found.get("graders") or [], found.get("rows") or []
    parts = []
    if graders:
        own = [[row["grader"], row["puzzle"], *_quality(row)] for row in graders]
        parts.append((NOTE.format(what="the puzzle's own held-out attempts"), [["grader", "attempts at", *QUALITY], *own]))
    if rows:
        note = (
            f"Best of k answers by the grades of {found['grader']}, against the majority of the m answers that cost no more tokens a "
            f"problem (prompt, answers and grades), at the largest k for which m were sampled. Differences in points, paired over "
            f"{rows[0]['n']} held-out problems, with 95% intervals. Without k: a grade costs more than all answers."
        )
        parts.append((note, [["model", "puzzle", *BEST], *([row["model"], row["puzzle"], *_best(row)] for row in rows)]))
        real = [[row["model"], row["puzzle"], *_quality(row), _short(row["auc"]), count(row["grade_tokens"])] for row in rows]
        note = f"Grades of the models' answers, by {found['grader']}, as above." if graders else NOTE.format(what="the models' answers")
        note += " AUC: chance that a right answer scores above a wrong one; tokens: of a grade, its prompt too."
        parts.append((note, [["answers of", "to", *QUALITY, "AUC", "tokens"], *real]))
    return parts


def _quality(row: Mapping[str, Any]) -> list[str]:
    shares = [percent(row[key]) for key in ("verdict", "named", "sound")]
    grades = [percent(row["real"]), between(row, percent, "real_")]
    return [count(row["attempts"]), *grades, *shares, _short(row["brier"]), percent(row["missing"])]


def _best(row: Mapping[str, Any]) -> list[str]:
    compared = [_gain(row.get(key)) for key in ("over_majority", "over_once", "majority_over_once")]
    tokens = next((point["tokens"] for point in row["points"] if point["k"] == row["k"]), None)
    numbers = [count(row["k"]), percent(row.get("best_k")), count(row.get("m")), percent(row.get("maj_m")), count(tokens)]
    return [percent(row["pass_1"]), *numbers, *compared]


def _gain(found: Mapping[str, float] | None) -> str:
    if not found:
        return NONE
    gain, low, high = (points(100 * found[key]) for key in ("gain", "low", "high"))
    return f"{gain} ({low} to {high})"


def _short(value: float | None) -> str:
    return NONE if absent(value) else f"{value:.3f}"
