"""A run that is not done yet: where its stages stand, from the metrics they have written so far."""

from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from pascaline.eval.forms import clock, count
from pascaline.eval.report import report_html
from pascaline.progress import label, number
from pascaline.runs import Metrics, is_complete, read_json, write_atomic

LATEST = 20  # steps whose mean is shown: one step is noisy
MEASURED = ("reward", "entropy", "loss", "tokens_per_s", "gemm_share", "mfu", "grad_norm", "max_violation", "dead_experts")


def standing(out: Path) -> list[dict[str, Any]]:
    """One object for each training stage that has begun: done, steps, tokens, seconds, the means of the latest steps, and how often the
    guard gave which answer."""
    stages = []
    for folder in _folders(out):
        if rows := Metrics.read(folder / "metrics.jsonl"):
            told = {"name": folder.name[3:], "done": is_complete(folder), "steps": rows[-1]["step"] + 1, "seconds": rows[-1].get("seconds")}
            told["tokens"] = sum(row.get("tokens", 0) for row in rows)
            for key in MEASURED:
                values = [row[key] for row in rows[-LATEST:] if row.get(key) is not None]
                told[key] = fmean(values) if values else None
            stages.append({**told, "guard": dict(Counter(row["guard"] for row in rows if "guard" in row))})
    return stages


def _folders(out: Path) -> list[Path]:
    """The stages' folders, NN-NAME."""
    return sorted(out.glob("[0-9][0-9]-*"))


def extension(out: Path) -> dict[str, Any]:
    """What context extension came to, {} if it has not."""
    return next((read_json(path) or {} for path in out.glob("[0-9][0-9]-extend/extension.json")), {})


def standing_table(stages: list[dict[str, Any]]) -> list[list[str]]:
    """The same to be read: a head, and a row a stage."""
    shown = [key for key in MEASURED if any(stage[key] is not None for stage in stages)]
    head = ["stage", "steps", "tokens", "time", *map(label, shown), "guard"]
    rows = [
        [stage["name"], f"{count(stage['steps'])}{' (all)' if stage['done'] else ''}", count(stage["tokens"]), clock(stage["seconds"])]
        + ["-" if stage[key] is None else number(stage[key], key) for key in shown]
        + [", ".join(f"{n} {kind}" for kind, n in stage["guard"].items()) or "-"]
        for stage in stages
    ]
    return [head, *rows]


def draw(out: Path, cost: dict[str, Any]) -> Path:
    """Write OUT/report.html with the curves there are, and what `ledger.cost` gave; its path."""
    found = standing(out)
    curves = {folder.name[3:]: Metrics.read(folder / "metrics.jsonl") for folder in _folders(out)}
    traces = {folder.name[3:]: Metrics.read(folder / "traces.jsonl") for folder in _folders(out)}
    told = {"standing": standing_table(found) if found else [], "ledger": cost, "extension": extension(out)}
    write_atomic(out / "report.html", report_html(told, curves, traces))
    return out / "report.html"
