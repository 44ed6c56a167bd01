"""The table of a chain, stages x measures, as rows of text for a terminal and a page. It only reads report.json."""

from collections.abc import Mapping
from typing import Any

from pascaline.eval.forms import clock, count, flops, percent


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """How to read it, and a head with a row a stage; [] without a table, or with one stage, which there is nothing to compare with."""
    table = report.get("table") or {}
    found = table.get("rows") or []
    if len(found) < 2:
        return []
    puzzles, k = list(found[0]["puzzles"]), table["k"]
    spent = {row["name"]: [clock(row.get("seconds")), flops(row.get("flops"))] for row in report.get("stages", [])}
    head = ["stage", *(f"{name} 1/{k}/maj" for name in puzzles), "format", "language", "wins", "tokens", "time", "FLOPs"]
    rows = [[row["stage"], *(_puzzle(row["puzzles"][name]) for name in puzzles), *_style(row), *spent[row["stage"]]] for row in found]
    return [(_note(table), [head, *rows])]


def _puzzle(measured: Mapping[str, float]) -> str:
    return " / ".join(percent(measured[key]).rstrip("%") for key in ("pass_1", "pass_k", "maj_k"))


def _style(row: Mapping[str, Any]) -> list[str]:
    return [percent(row["format"]), percent(row["language"]), percent(row.get("win_rate")), count(row["mean_tokens"])]


def _note(table: Mapping[str, Any]) -> str:
    k, judge = table["k"], f"the reward model {table['judge']}" if table["judge"] else "the verifier"
    return (
        f"pass@1, pass@{k} and the majority of {k}, in percent of held-out problems; format: one closed thought and an answer; language: "
        f"words of the thought in the one asked for; wins: of {table['n']} problems of each puzzle, those on which {judge} finds the first "
        f"answer better than that of {table['against']}, ties half."
    )
