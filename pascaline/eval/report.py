"""What a chain of stages came to: the page report.html, and the table a terminal prints. Both only read report.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pascaline.eval import chaintable, extension, gradetable, plots, trial
from pascaline.eval.forms import NONE, absent, aligned, between, clock, count, flops, number, percent, points
from pascaline.eval.trial import Section
from pascaline.tables import kind

Curves = Mapping[str, Sequence[Mapping[str, Any]]]
LOSSES = {"pretrain": "Pre-training loss", "extend": "Context extension loss", "sft": "Fine-tuning loss (assistant tokens)",
          "prefer": "Preference loss", "distil": "Distillation loss"}  # fmt: skip


def report_html(report: Mapping[str, Any], curves: Curves, traces: Curves | None = None) -> str:
    """The whole page: no script, no network, everything that came from a model escaped.

    report: the content of report.json; curves: stage name -> rows of its metrics.jsonl; traces: the same of traces.jsonl. What is missing
    is left out.
    """
    from markupsafe import Markup

    filters = {"percent": percent, "count": count, "flops": flops, "time": clock, "points": points, "cost_note": cost_note}
    tables = {"standing": report.get("standing"), "cost": cost_table(report.get("ledger") or {})}
    facts = {key: report.get(key) or {} for key in ("gain", "versions", "machine", "ledger")}
    sections = _sections(report, curves, traces or {})
    for section in sections:
        section.drawings = [(Markup(svg), caption) for svg, caption in section.drawings if svg]
    sections = [section for section in sections if section.drawings or section.traces]
    told = {key: report.get(key) or [] for key in ("stages", "protocols", "examples")}
    facts |= {
        "chain": chaintable.tables(report),
        "graded": gradetable.tables(report),
        "tables": extension.tables(report.get("extension") or {}),
    }
    return page(
        "report.html.jinja", filters, **told, **facts, **tables, recipe=report.get("recipe"), seed=report.get("seed"), sections=sections
    )


def page(name: str, filters: Mapping[str, Any], **values: Any) -> str:
    """A template of this folder in the pages' style. All values are escaped, but for the drawings made here, which are Markup."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    folder = Path(__file__).parent
    template = environment.from_string((folder / name).read_text(encoding="utf-8"))
    return template.render(**values, style=Markup((folder / "style.css").read_text(encoding="utf-8")))


def table_text(report: Mapping[str, Any]) -> str:
    """The same numbers for a terminal: a row a stage, then a row a sampling protocol, then the gain."""
    head = ["stage", "accuracy", "95% interval", "n", "tokens", "time", "FLOPs"]
    rows = [[row["name"], *_accuracy(row), clock(row.get("seconds")), flops(row.get("flops"))] for row in report.get("stages", [])]
    parts = [aligned([head, *rows])] if rows else []
    ends = {"abstain": "abstain", "false_claim": "false", "truncated": "cut off"}
    if any(row.get("unjudged") for row in report.get("protocols", [])):
        ends["unjudged"] = "no verdict"
    called = ["calls"] if any("calls" in row for row in report.get("protocols", [])) else []  # of an environment, in an episode
    head = ["model", "puzzle", "temp", "top-p", "samples", "accuracy", "95% interval", "n", "tokens", *ends.values(), *called]
    rows = [
        [str(row.get("model", NONE)), str(row.get("puzzle") or NONE), *(count(row.get(key)) for key in ("temperature", "top_p", "samples"))]
        + _accuracy(row)
        + [percent(row.get(key)) for key in ends]
        + [count(row.get(key)) for key in called]
        for row in report.get("protocols", [])
    ]
    if rows:
        parts.append(aligned([head, *rows]))
    told = [*chaintable.tables(report), *gradetable.tables(report)]
    parts += [f"{aligned(rows)}\n{note}" for note, rows in told] + extension_text(report.get("extension"))
    gain = report.get("gain") or {}
    if report.get("ledger"):
        parts.append(cost_text(report["ledger"]))
    if gain.get("points") is not None:
        pair = f"{gain.get('after', 'rl')} over {gain.get('before', 'sft')}"
        parts.append(f"gain of {pair}: {points(gain['points'])} points (95% interval {between(gain, points)})")
    return "\n\n".join(parts)


def cost_table(cost: Mapping[str, Any]) -> list[list[str]]:
    """What `ledger.cost` gives, to be read: a head, a row a stage, one for runs set aside, one for the sum. [] without."""
    if not cost:
        return []
    units = {"device_hours": "device-hours", "flops": "FLOPs", "kwh": "kWh", "money": cost["currency"] or "money"}
    keys = [key for key in units if cost["total"]["all"][key] is not None]
    head = ["cost", "attempts", *(name for key in keys for name in (units[key], "all")), "all/final"]
    rows = [{"name": "set aside", **cost["aside"]}] if "aside" in cost else []
    rows = [*cost["stages"], *rows, {"name": "in total", **cost["total"]}]
    return [head, *([row["name"], _attempts(row.get("ends", {})), *_spent(row, keys), _ratio(row)] for row in rows)]


def _attempts(ends: Mapping[str, int]) -> str:
    """3 (2 killed); one that is done needs no word."""
    count = sum(ends.values())
    bad = ", ".join(f"{n} {end}" if count > 1 else end for end, n in ends.items() if end != "done")
    return f"{count}{f' ({bad})' * bool(bad)}" if ends else ""


def _spent(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    forms = {"flops": flops}
    return [forms.get(key, number)(row.get(when, {}).get(key)) for key in keys for when in ("final", "all")]


def _ratio(row: Mapping[str, Any]) -> str:
    return NONE if absent(row.get("ratio")) else f"{row['ratio']:.2f}"


def cost_note(cost: Mapping[str, Any]) -> str:
    watts = f" Energy is an estimate: {cost['watts']:g} W a device." if cost["watts"] else ""
    return f"First column of each pair: what the steps that stand have cost. Second: all attempts, failed and repeated ones too.{watts}"


def cost_text(cost: Mapping[str, Any]) -> str:
    return f"{aligned(cost_table(cost))}\n{cost_note(cost)}"


def extension_text(found: Mapping[str, Any] | None) -> list[str]:
    """What context extension did, a table a measure, with a line on its numbers below."""
    return [f"{aligned(rows)}\n{note}" for note, rows in extension.tables(found or {})]


def _accuracy(row: Mapping[str, Any]) -> list[str]:
    interval = between(row, percent, "accuracy_")
    return [percent(row.get("accuracy")), interval, count(row.get("n")), count(row.get("mean_tokens"))]


def _entropy_range(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the routers' entropies of the layer where it is lowest and of the one where it is highest."""
    return [{**row, "low": min(row["router_entropy"]), "high": max(row["router_entropy"])} for row in rows if row.get("router_entropy")]


def _sections(report: Mapping[str, Any], curves: Curves, traces: Curves) -> list[Section]:
    tried = {name: rows for name, rows in curves.items() if trial.is_trial(name, rows)}
    read = {name: rows for name, rows in curves.items() if kind(name) in LOSSES and name not in tried}
    model = (report.get("gain") or {}).get("after")
    graded = [row for row in (report.get("grading") or {}).get("rows", []) if row["model"] == model]
    more = [
        plots.votes(report.get("majority") or [], "Majority vote among k samples"),
        plots.votes(report.get("best_of") or [], "Best of k samples (pass@k)"),
        *(plots.spent({"best by the grader": row["points"], "majority": row["majority"]}, f"Votes and grades on {row['puzzle']}")
          for row in graded),
    ]  # fmt: skip
    return [
        _learning(read),
        *(trial.section(name, rows, traces.get(name) or []) for name, rows in tried.items()),
        Section("More samples", "Held-out problems.", [(drawing, "") for drawing in more]),
        _experts(curves.get("pretrain") or [], tried),
    ]


def _learning(read: Curves) -> Section:
    """The losses of the stages that learn from what is written."""
    drawings = []
    for name, rows in read.items():
        title = LOSSES[kind(name)] + ("" if name == kind(name) else f": {name}")
        axis = (
            {"x": "tokens", "width": 0.05 if kind(name) == "extend" else 0.02} if kind(name) in ("pretrain", "extend") else {"width": 0.03}
        )
        drawings.append((plots.curve(rows, {"loss": "loss"}, "loss (nats per token)", title, **axis), ""))
    left_out = sum("guard" in row for rows in read.values() for row in rows)
    skipped = f" The guard left out {left_out} step{'s' * (left_out > 1)}: metrics.jsonl says why." if left_out else ""
    return Section("Learning from text", f"Faint: each step. Strong: running mean.{skipped}", drawings)


def _experts(pretrain: Sequence[Mapping[str, Any]], tried: Curves) -> Section:
    entropies = {"low": "lowest layer", "high": "highest layer"}
    drawings = [
        plots.expert_load(pretrain, "After pre-training"),
        *(plots.expert_load(rows, "After RL" if name == "rl" else f"After {name}") for name, rows in tried.items()),
        plots.curve(pretrain, {"max_violation": "max"}, "max violation", "Balance in pre-training", x="tokens", width=0.02),
        plots.curve(_entropy_range(pretrain), entropies, "entropy (nats per token)", "Entropy of the routers", x="tokens", width=0.02),
        plots.curve(pretrain, {"dead_experts": "experts"}, "experts without a token", "Dead experts", x="tokens", width=0.02),
    ]
    note = (
        "Tokens each expert received, relative to an even share (1.00), in the last steps. Max violation: the busiest expert's excess "
        "over an even share. A router that cannot tell experts apart has the entropy log E."
    )
    return Section("Load of the experts", note, [(drawing, "") for drawing in drawings])
