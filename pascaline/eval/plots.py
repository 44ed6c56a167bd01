"""The report's plots as inline SVG. Colours are CSS variables of the page, so one drawing serves light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]

# Stand-ins that matplotlib takes for colours; each becomes the style expression beside it.
INK, MUTED, GRID, BLUE, ORANGE, GREEN = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
STYLES = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)"}
STYLES |= {BLUE: "var(--blue)", ORANGE: "var(--orange)", GREEN: "var(--green)"}
POINTS = 1000  # a longer curve is averaged down to this many: more cannot be seen, and would only make the page heavy
LEVELS = 12  # opacities in a heat map
AT_END = 10  # last rows whose expert load is averaged: a single batch is noisy


def curve(
    rows: Rows,
    series: Mapping[str, str],
    y_label: str,
    title: str,
    *,
    x: str = "step",
    width: float = 0.1,
    log: bool = False,
) -> str | None:
    """One panel of `series` (key in the rows -> legend) over `x`: raw values faint, a mean over `width` of it on top.

    x: "step", or "tokens", which a row counts for its step alone and the panel adds up ("step" where a row has none). log: the y axis.

    Returns the <svg> text, or None where no row holds any of the keys as a finite number.
    """
    known = [(key, name, colour) for (key, name), colour in zip(series.items(), (BLUE, ORANGE, GREEN), strict=False)]
    known = [line for line in known if np.isfinite(column(rows, line[0])).any()]
    if not known:
        return None
    along = column(rows, x)
    if x == "tokens" and np.isfinite(along).all():
        along = np.cumsum(along)  # a row tells the tokens of its step
    elif x != "step":
        x, along = "step", column(rows, "step")
    figure, axes = _panel(title)
    scale, x_label = _scaled(along, x)
    for key, name, colour in known:
        at, raw, mean = smooth(along / scale, column(rows, key), width)
        axes.plot(at, raw, color=colour, alpha=0.28, linewidth=0.8)
        axes.plot(at, mean, color=colour, linewidth=1.8, label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    if log and any((column(rows, key) > 0).any() for key, *_ in known):
        axes.set_yscale("log", nonpositive="mask")
    if len(known) > 1:
        _legend(axes)
    return _svg(figure, title)


def shares(rows: Rows, series: Mapping[str, str], y_label: str, title: str, *, width: float = 0.1) -> str | None:
    """One panel of `series` (key in the rows -> legend), each as wide as its running mean, one upon the other from 0 to 1 over the step.
    A value that a row lacks is 0 there. None where no row holds any."""
    held = [row for row in rows if any(np.isfinite(column([row], key))[0] for key in series)]
    if not held:
        return None
    figure, axes = _panel(title)
    bands = []
    for key in series:
        at, _, mean = smooth(column(held, "step"), np.nan_to_num(column(held, key)), width)
        bands.append(mean)
    colours = [*(BLUE, ORANGE, GREEN)[: len(series) - 1], MUTED]
    axes.stackplot(at, *bands, labels=list(series.values()), colors=colours, alpha=0.55, linewidth=0)
    axes.set(xlabel="step", ylabel=y_label, ylim=(0, 1), xlim=(at[0], max(at[-1], at[0] + 1)))
    _legend(axes)
    return _svg(figure, title)


def expert_load(rows: Rows, title: str) -> str | None:
    """Heat map, a row a mixture-of-experts layer and a column an expert: load relative to an even share, at the end.

    rows[i]["expert_load"]: [layers][experts] shares of the routed tokens. Numbers stand in the cells where they fit.
    """
    loads = [np.asarray(row["expert_load"], dtype=np.float64) for row in rows if row.get("expert_load")][-AT_END:]
    loads = [load for load in loads if load.ndim == 2 and load.shape == loads[-1].shape and load.size]
    if not loads:
        return None
    mean = np.nanmean(loads, axis=0)
    ratio = mean / np.maximum(mean.mean(axis=1, keepdims=True), 1e-12)  # 1: an even share
    layers, experts = ratio.shape
    figure, axes = _panel(title, height=min(6.0, 1.3 + 0.33 * layers))
    _cells(axes, np.clip(np.nan_to_num(ratio) / 2, 0, 1))
    if experts <= 16 and layers <= 16:
        for (layer, expert), value in np.ndenumerate(ratio):
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=INK)
    axes.set(xlim=(-0.5, experts - 0.5), ylim=(layers - 0.5, -0.5), xlabel="expert", ylabel="layer with experts")
    axes.set_xticks(_ticks(experts))
    axes.set_yticks(_ticks(layers), [str(i + 1) for i in _ticks(layers)])
    axes.grid(visible=False)
    return _svg(figure, f"{title}: load relative to an even share")


def heat_map(cells: Rows, title: str) -> str | None:
    """Recall over length and depth (or number of pairs): a cell of `cells` each, with its percent written in it.

    cells: {"length", "depth" or "pairs", "recall": 0..1 or None, "n"}. The beginning of the text is at the top. What was not measured
    is left empty. None without a number.
    """
    known = [cell for cell in cells if cell.get("recall") is not None]
    if not known:
        return None
    rows, label = ("depth", "depth of the needle") if "depth" in known[0] else ("pairs", "pairs of key and value")
    x, y = sorted({cell["length"] for cell in known}), sorted({cell[rows] for cell in known})
    recall = np.full((len(y), len(x)), np.nan)
    for cell in known:
        recall[y.index(cell[rows]), x.index(cell["length"])] = cell["recall"]
    figure, axes = _panel(title, height=min(8.0, 1.3 + 0.33 * len(y)))
    _cells(axes, recall, strongest=0.5)  # above that the numbers are hard to read, on a dark page first
    for (row, at), value in np.ndenumerate(recall):
        if np.isfinite(value):
            axes.text(at, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7 if len(x) > 10 else 9, color=INK)
    few = min(cell["n"] for cell in known)
    each = f"{few}" if few == max(cell["n"] for cell in known) else f"{few} or more"
    axes.set(xlim=(-0.5, len(x) - 0.5), ylim=(len(y) - 0.5, -0.5), xlabel=f"length in tokens ({each} a cell)", ylabel=label)
    axes.set_xticks(range(len(x)), [_short(length) for length in x])
    axes.set_yticks(range(len(y)), [f"{value:g}" for value in y])
    axes.grid(visible=False)
    return _svg(figure, f"{title}: percent")


def votes(points: Rows, title: str) -> str | None:
    """Accuracy over the number of samples k (log2): `accuracy` after, and `before` where given, dashed."""
    points = sorted((point for point in points if point.get("k")), key=lambda point: point["k"])
    if not np.isfinite(column(points, "accuracy")).any():
        return None
    figure, axes = _panel(title)
    k = column(points, "k")
    axes.plot(k, 100 * column(points, "accuracy"), color=BLUE, marker="o", markersize=4, linewidth=1.8, label="after")
    if np.isfinite(column(points, "before")).any():
        before = 100 * column(points, "before")
        axes.plot(k, before, color=ORANGE, marker="s", markersize=4, linewidth=1.5, linestyle="--", label="before")
        _legend(axes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, [f"{int(value)}" for value in k])
    axes.minorticks_off()
    axes.set(xlabel="samples per problem k (log scale)", ylabel="accuracy (%)")
    return _svg(figure, title)


def spent(curves: Mapping[str, Rows], title: str) -> str | None:
    """Accuracy over the tokens that a problem took (log2), a curve for each name; rows: `tokens`, `accuracy`, and `k`, written beside."""
    if not any(np.isfinite(column(rows, "accuracy")).any() for rows in curves.values()):
        return None
    figure, axes = _panel(title)
    for (name, rows), colour, marker, lift in zip(curves.items(), (BLUE, ORANGE), ("o", "s"), (5, -11), strict=False):
        x, y = column(rows, "tokens"), 100 * column(rows, "accuracy")
        axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
        for at, height, row in zip(x, y, rows, strict=True):
            axes.annotate(f"{row['k']}", (at, height), (0, lift), "data", "offset points", fontsize=7, color=MUTED, ha="center")
    _legend(axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set(xlabel="tokens a problem, prompts and grades too (log scale)", ylabel="accuracy (%)")
    return _svg(figure, title)


def column(rows: Rows, key: str) -> Floats:
    """[rows] of `key` as floats, NaN where a row has none or null."""
    values = [row.get(key) for row in rows]
    return np.array([float(v) if isinstance(v, int | float) else np.nan for v in values], dtype=np.float64)


def smooth(x: Floats, y: Floats, width: float) -> tuple[Floats, Floats, Floats]:
    """(x, y, running mean of y) of the finite points, at most POINTS of them.

    The window is bell-shaped (Hann), centred, `width` of the curve wide at half its height, and cut at the ends.
    """
    whole = np.isfinite(x) & np.isfinite(y)
    x, y = x[whole], y[whole]
    if x.size > POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(values, POINTS)]) for values in (x, y))
    half = int(x.size * width)
    window = np.hanning(2 * half + 3)[1:-1]
    mean = np.convolve(y, window) / np.convolve(np.ones_like(y), window) if x.size else y
    return x, y, mean[half : half + x.size]


def _scaled(x: Floats, name: str) -> tuple[float, str]:
    top = np.nanmax(x)
    for size, letter in ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if name == "tokens" and top >= 2 * size:
            return size, f"tokens ({letter})"
    return 1.0, name


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 8192 and length % 1024 == 0 else f"{length:,}"


def _ticks(count: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if count <= 16 * step)
    return list(range(0, count, step))


def _cells(axes: Any, strength: Floats, strongest: float = 0.8) -> None:
    """[rows, columns] in 0..1 as opacity up to `strongest`, NaN as nothing; one path a level keeps the page small for 61 layers of 256
    experts."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    square = np.array([(-0.47, -0.44), (0.47, -0.44), (0.47, 0.44), (-0.47, 0.44), (-0.47, -0.44)])
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    level = np.round(np.nan_to_num(strength, nan=-1) * (LEVELS - 1)).astype(int)
    for value in np.unique(level[level >= 0]):
        places = np.argwhere(level == value)[:, ::-1]
        path = Path((places[:, None] + square).reshape(-1, 2), codes * len(places))
        axes.add_patch(PathPatch(path, facecolor=BLUE, alpha=0.04 + (strongest - 0.04) * value / (LEVELS - 1), linewidth=0))


def _panel(title: str, height: float = 2.9) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=8)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(color=GRID, labelcolor=MUTED, labelsize=8.5)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    for side, spine in axes.spines.items():
        spine.set_color(GRID)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8.5, labelcolor=INK, frameon=False, loc="best")


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    out = io.StringIO()
    # Text stays text (selectable, in the page's font); the salt makes ids, and so the report, repeatable.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": False}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family:[^;\"]*;?", "", text)
    text = re.sub(r"font: (?:bold |700 )?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    # Ids are the page's, not the drawing's: two drawings must not share one.
    prefix = re.sub(r"\W+", "-", name).lower()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
    for colour, style in STYLES.items():
        text = text.replace(colour, style)
    return text
