"""How numbers are written for people, in a terminal and on a page alike."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pascaline.progress import number as short

NONE = "-"


def percent(value: float | None) -> str:
    """0.4412 -> 44.1%"""
    return NONE if absent(value) else f"{100 * value:.1f}%"  # type: ignore[operator]


def points(value: float | None) -> str:
    """A difference in points of a percent, with its sign: 19.2 -> +19.2"""
    return NONE if absent(value) else f"{value:+.1f}"


def count(value: float | None) -> str:
    """1234 -> 1,234; fractions: 57.345 -> 57.3, 0.95 -> 0.95, 0.6 -> 0.6"""
    if value is None or absent(value):
        return NONE
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}".rstrip("0")


def number(value: float | None) -> str:
    """Three significant digits: 0.0123, 12.3k"""
    return NONE if value is None or absent(value) else short(value)


def flops(value: float | None) -> str:
    """1.234e15 -> 1.23e15"""
    return NONE if not value or absent(value) else f"{value:.2e}".replace("e+", "e")


def clock(value: float | None) -> str:
    """Seconds: 4.2 s, 1 min 05 s, 2 h 03 min"""
    if value is None or absent(value):
        return NONE
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def absent(value: object) -> bool:
    return not isinstance(value, int | float) or not math.isfinite(value)


def between(row: Mapping[str, Any], form: Any, prefix: str = "") -> str:
    low, high = row.get(f"{prefix}low"), row.get(f"{prefix}high")
    return NONE if absent(low) or absent(high) else f"{form(low)} to {form(high)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first to the left and numbers to the right, a rule below the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
