"""extension.json as tables: a row a model, a column a range of positions."""

from collections.abc import Mapping
from typing import Any

NAMES = {"plain": "as pre-trained", "yarn": "YaRN, not tuned", "tuned": "YaRN, tuned"}
Rows = list[list[str]]


def tables(extension: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """(what the numbers are, head and rows) of the loss by position and of needle recall; a table without a number is left out."""
    models = extension.get("models") or []
    found: list[tuple[str, Rows]] = []
    if models:
        head = ["loss by position", *(f"{span['from']:,} to {span['to']:,}" for span in models[0]["loss"])]
        rows = [[NAMES[m["model"]], *(_loss(span) for span in m["loss"])] for m in models]
        counts = ", ".join(f"{span['tokens']:,} of {span['documents']}" for span in models[0]["loss"])
        found.append((f"Nats per token (perplexity) on held-out texts, by position; tokens and texts: {counts}.", [head, *rows]))
    if models and models[0]["needles"]:
        head = ["needle recall", *(f"{row['length']:,} tokens" for row in models[0]["needles"])]
        rows = [[NAMES[m["model"]], *(_recall(row) for row in m["needles"])] for m in models]
        each = models[0]["needles"][0]
        depths = ", ".join(f"{cell['depth']:g}" for cell in each["by_depth"])
        found.append((f"Needles found, greedy, with 95% interval; {each['n']} a length, at depths {depths}.", [head, *rows]))
    return found


def summary_line(model: Mapping[str, Any]) -> str:
    """One model's numbers: nats per token by range, recall by length."""
    losses = ", ".join(f"{_number(span['nats'])} to {span['to']:,}" for span in model["loss"])
    needles = ", ".join(f"{row['recall']:.0%} at {row['length']:,}" for row in model["needles"])
    return f"{NAMES[model['model']]}: nats per token {losses}" + (f"; needles {needles}" if needles else "")


def _loss(span: Mapping[str, Any]) -> str:
    return f"{_number(span['nats'])} ({span['perplexity']:.4g})" if span["tokens"] else "-"


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.3f}"


def _recall(row: Mapping[str, Any]) -> str:
    return f"{100 * row['recall']:.0f}% ({100 * row['low']:.0f} to {100 * row['high']:.0f})"
