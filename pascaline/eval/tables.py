"""A suite's result and its comparison as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pascaline.eval.forms import NONE, aligned, count, percent, points
from pascaline.eval.report import page

ENDS = {"abstain": "abstain", "false_claim": "false", "truncated": "cut off", "unclosed": "unclosed", "unjudged": "no verdict"}
Told = Mapping[str, Any]


def text(result: Told, comparison: Told | None = None) -> str:
    """All of it: a table a model, then the comparison."""
    parts = [model_text(model) for model in result["models"]]
    if comparison:
        parts += [pair_text(pair) for pair in comparison["pairs"]]
        if comparison["without"]:
            parts.append(without_text(comparison["without"]))
    return "\n\n".join(parts)


def page_html(result: Told, comparison: Told | None = None) -> str:
    """The same as one page, with heat maps of what has cells, and some answers to read."""
    from markupsafe import Markup

    from pascaline.eval import plots

    parts = []
    for model in result["models"]:
        title, table = _headed(model_text(model))
        maps = [plots.heat_map(task["cells"], label) for label, task in model["tasks"].items() if task.get("cells")]
        parts.append((title, table, [Markup(svg) for svg in maps if svg]))
    if comparison:
        parts += [(*_headed(pair_text(pair)), []) for pair in comparison["pairs"]]
        if comparison["without"]:
            parts.append(("Without each task in turn", without_text(comparison["without"]), []))
    examples = [
        (model["name"], label, example)
        for model in result["models"]
        for label, task in model["tasks"].items()
        for example in task.get("examples", [])
    ]
    machine, versions = result["machine"], result["versions"]
    told = f"{machine.get('cpu')}, {machine.get('cores')} cores; pascaline {versions.get('pascaline')}, torch {versions.get('torch')}."
    return page("evaluation.html.jinja", {}, suite=result["suite"].get("name"), parts=parts, examples=examples, machine=told)


def _headed(text: str) -> tuple[str, str]:
    head, _, rest = text.partition("\n")
    return head, rest


def model_text(model: Told) -> str:
    """A row a task. Columns that no task has anything for are left out."""
    tasks: Told = model["tasks"]
    widest = max((row["k"] for task in tasks.values() for row in task.get("by_k", [])), default=1)
    head = ["task", "score", "95% interval", "n", "constant", *([f"pass@{widest}", f"maj@{widest}"] if widest > 1 else []), "tokens",
            "(right)", "(wrong)", *ENDS.values()]  # fmt: skip
    rows = [head, *(_row(label, task, widest) for label, task in tasks.items())]
    kept = [i for i in range(len(head)) if i < 2 or any(_told(head[i], row[i]) for row in rows[1:])]
    config = model.get("config") or {}
    size = f"{config['model_type']}, {config['parameters']:,} parameters, " if config else ""
    asked = ", asked as plain text" if model.get("plain") else ""
    title = f"{model['name']} ({size}weights {str(model.get('sha256', {}).get('weights', NONE))[:12]}{asked})"
    return "\n".join([title, aligned([[row[i] for i in kept] for row in rows]), *_notes(tasks)])


def _told(column: str, cell: str) -> bool:
    """Whether a cell is worth a column: what never happened is not."""
    return cell != NONE and not (column in ENDS.values() and cell == "0.0%")


def _row(label: str, task: Told, widest: int) -> list[str]:
    share = task.get("unit", "share") == "share"
    form = percent if share else _value
    interval = NONE if task.get("low") is None or math.isnan(task["low"]) else f"{form(task['low'])} to {form(task['high'])}"
    most: Told = next((row for row in task.get("by_k", []) if row["k"] == widest), {})
    more = [percent(most.get("pass")), percent(most.get("majority"))] if widest > 1 else []
    answered = "tokens_right" in task  # in other tasks `tokens` may be a length of the prompt
    lengths = [count(task.get(key)) if answered else NONE for key in ("tokens", "tokens_right", "tokens_wrong")]
    constant = percent((task.get("constant") or {}).get("score"))
    score = form(task["score"]) if share or task["score"] is None else f"{form(task['score'])} {task['unit']}"
    return [label, score, interval, count(task["n"]), constant, *more, *lengths, *(percent(task.get(key)) for key in ENDS)]


def _notes(tasks: Told) -> list[str]:
    notes = []
    for label, task in tasks.items():
        asked = task.get("plan", {}).get("problems")
        if task.get("constant") is not None and asked and len(task["keys"]) < asked:
            notes.append(f"{label}: there are only {len(task['keys'])} problems, {asked} were asked for.")
        if task.get("too_long"):
            notes.append(f"{label}: {percent(task['too_long'])} of the problems do not fit the model's context, and count as cut off.")
        if task.get("trouble"):
            notes.append(f"{label}: {percent(task.get('unjudged'))} of the answers could not be judged ({task['trouble']}).")
        if task.get("perplexity") is not None and task.get("bits_per_byte") is not None:
            notes.append(f"{label}: {task['bits_per_byte']:.4f} bits per byte over all texts, perplexity {task['perplexity']:.2f} a token.")
    return notes


def pair_text(pair: Told) -> str:
    """What the second model gained and lost against the first, the greatest loss first."""
    head = ["task", "before", "after", "difference", "95% interval", "n", "gained", "lost", "p"]
    rows = [head]
    for row in pair["tasks"]:
        share = row["unit"] == "share"
        form, scale = (percent, 100) if share else (_value, 1)
        move = points if share else _change
        low, high = (None if row[key] is None else scale * row[key] for key in ("low", "high"))
        change = None if row["difference"] is None else scale * row["difference"]
        interval = NONE if low is None or math.isnan(low) else f"{move(low)} to {move(high)}"
        rows.append([row["task"], form(row["before"]), form(row["after"]), move(change), interval, count(row["n"]),
                     f"{row['gained']} ({percent(row['gained_share'])})", f"{row['lost']} ({percent(row['lost_share'])})",
                     f"{row['p']:.2g}"])  # fmt: skip
    notes = [f"{row['task']}: asked otherwise ({', '.join(row['asked'])})." for row in pair["tasks"] if row["asked"]]
    notes += [f"Only one of the two has {', '.join(pair['missing'])}."] * bool(pair["missing"])
    return "\n".join([f"From {pair['before']} to {pair['after']}, most lost first", aligned(rows), *notes])


def without_text(without: Told) -> str:
    """The mean over the tasks, and without each of them."""
    head = ["mean without", *without["names"], "ranks"]
    rows = [[row["without"] or "(all tasks)", *(percent(mean) for mean in row["means"]),
             " ".join(map(str, row["ranks"])) + " changed" * row["changes"]] for row in without["rows"]]  # fmt: skip
    changed = [row["without"] for row in without["rows"] if row["changes"]]
    verdict = f"The ranking depends on {', '.join(changed)}." if changed else "The ranking is the same without any one of the tasks."
    left = f" Not in the means (not a share, or less is better): {', '.join(without['left_out'])}." if without["left_out"] else ""
    return f"{aligned([head, *rows])}\n{verdict}{left}"


def _value(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.4g}"


def _change(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:+.3g}"
