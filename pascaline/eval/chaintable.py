"""The table of a chain, stages x measures, as rows of text for a terminal and a page. It only reads report.json's `table`."""

from collections.abc import Mapping
from typing import Any

from pascaline.eval.report import clock, count, flops, percent


def rows(table: Mapping[str, Any]) -> list[list[str]]:
    """A head and a row a stage; [] without a table, or with one stage, which there is nothing to compare with."""
    found = table.get("rows") or []
    if len(found) < 2:
        return []
    puzzles, k = list(found[0]["puzzles"]), table["k"]
    head = ["stage", *(f"{name} 1/{k}/maj" for name in puzzles), "format", "language", "wins", "tokens", "time", "FLOPs"]
    return [head, *([row["stage"], *(_puzzle(row["puzzles"][name]) for name in puzzles), *_rest(row)] for row in found)]


def _puzzle(measured: Mapping[str, float]) -> str:
    return " / ".join(percent(measured[key]).rstrip("%") for key in ("pass_1", "pass_k", "maj_k"))


def _rest(row: Mapping[str, Any]) -> list[str]:
    shares = [percent(row["format"]), percent(row["language"]), percent(row.get("win_rate"))]
    return [*shares, count(row["mean_tokens"]), clock(row["seconds"]), flops(row["flops"])]


def note(table: Mapping[str, Any]) -> str:
    """How to read it, below it."""
    k, judge = table["k"], f"the reward model {table['judge']}" if table["judge"] else "the verifier"
    return (
        f"pass@1, pass@{k} and the majority of {k}, in percent of held-out problems; format: one closed thought and an answer; language: "
        f"words of the thought in the one asked for; wins: of {table['n']} problems of each puzzle, those on which {judge} finds the first "
        f"answer better than that of {table['against']}, ties half."
    )
