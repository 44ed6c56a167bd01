"""A chain of stages in one folder. Each stage is done once; whatever stops the chain, the same command goes on with it."""

import shutil
from pathlib import Path
from typing import Any

from pascaline.device import best_dtype, choose, place, restarted
from pascaline.errors import BadInput, nearest
from pascaline.ledger import Attempt, cost, set_aside
from pascaline.post.check import check, check_ranks, check_sinks
from pascaline.recipe import Recipe, differences, load, parse, to_toml
from pascaline.runs import TEMPORARY, Lock, complete, is_complete, read_json, write_atomic, write_json
from pascaline.tables import kind

RESOLVED_LATER = ("device", "dtype")  # "auto" in a recipe; a run keeps what it was resolved to
WATCHING = ("sinks", "ledger", "parallel")  # no part of what a run is, nor is a stage's `alarms`: it goes on with what is asked now
KEPT = (".lock", "ledger.jsonl")  # what --fresh leaves in place
SHOWN = 8  # keys named when two recipes differ


def run(
    recipe: str | Path,
    out: str | Path,
    overrides: dict[str, Any] | None = None,
    stage: str | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a recipe's stages into `out` and return the report ({} until the last stage is done).

    overrides: dotted keys ("rl.steps": 50). stage: stop after this one. fresh: start over and keep what is there in OUT.old-N.
    BadInput for a mistake in the recipe or a folder of another recipe; Stopped on Ctrl-C, after saving.
    """
    parsed, out = load(recipe, overrides), Path(out)
    fresh = fresh and not restarted()  # else what was begun afresh a moment ago would be set aside too
    if stage is not None and stage not in parsed.stages:
        raise BadInput(f"there is no stage '{stage}', only {', '.join(parsed.stages)}{nearest(stage, parsed.stages) or '.'}")
    if place()[0]:
        return _follow(parsed, out)
    _refuse_foreign(out)
    if fresh or not _begun(out):
        check(parsed)
    if fresh or not finished(out):
        check_sinks(parsed)
        check_ranks(parsed, place()[1])
    with Lock(out):
        if fresh:
            choose(parsed.device)  # what cannot work is said before anything is moved
            _set_aside(out)
        parsed = _settle(parsed, out)
        if finished(out) and (report := read_json(out / "report.json")):
            _dismiss(parsed)
            return report | {"ledger": cost(out, parsed.ledger)}
        return _run(parsed, out, stage, quiet)


def finished(out: str | Path) -> bool:
    return is_complete(out)


def _run(recipe: Recipe, out: Path, until: str | None, quiet: bool) -> dict[str, Any]:
    # torch and the rooms above it load only when there is work to do.
    import torch

    from pascaline.post.stage import TOGETHER, Run, record

    device = choose(recipe.device)
    dtype = best_dtype(device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    recipe = recipe.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    ranks = _ranks(recipe)
    current = Run(recipe, out, device, dtype, quiet, ranks)
    _write_recipe(recipe, out)
    for name in recipe.stages:
        if not is_complete(current.folder(name)):
            current.folder(name).mkdir(parents=True, exist_ok=True)
            if kind(name) in TOGETHER:
                ranks.tell((recipe.model_dump(mode="json"), name))
            with Attempt(out, name, ranks.size) as current.attempt:
                summary = _work(name)(current, name)
            record(current, name)
            complete(current.folder(name), summary)
        if name == until != recipe.stages[-1]:
            break
    ranks.tell()
    return {} if until not in (None, recipe.stages[-1]) else _finish(current)


def _work(name: str) -> Any:
    """The function that does a stage."""
    from pascaline.post import distil, evaluation, prefer, reject, rl, sft, stages

    chained = {"sft": sft.sft, "prefer": prefer.prefer, "rl": rl.rl, "reject": reject.reject, "distil": distil.distil,
               "eval": evaluation.evaluate}  # fmt: skip
    return chained.get(kind(name)) or getattr(stages, kind(name))


def _ranks(recipe: Recipe) -> Any:
    """The processes that torchrun started, if it did."""
    from pascaline.train import parallel

    return parallel.start(choose(recipe.device), recipe.parallel.experts, recipe.parallel.replicas)


def _dismiss(recipe: Recipe) -> None:
    """There is nothing to train: let the other ranks go."""
    if place()[1] > 1:
        _ranks(recipe).tell()


def _follow(recipe: Recipe, out: Path) -> dict[str, Any]:
    """What the ranks after the first do: wait for it, and train with it. They write nothing and say nothing."""
    import torch

    from pascaline.post.stage import Run

    ranks = _ranks(recipe)
    while (told := ranks.tell()) is not None:
        recipe, name = parse(told[0], ""), told[1]
        current = Run(recipe, out, choose(recipe.device), getattr(torch, recipe.dtype), quiet=True, ranks=ranks)
        _work(name)(current, name)
    return {}


def _finish(current: Any) -> dict[str, Any]:
    """OUT/model, OUT/report.json and OUT/report.html from the stages' folders."""
    from pascaline.eval.report import report_html
    from pascaline.post import evaluation
    from pascaline.post.instruments import TRACES
    from pascaline.runs import Metrics

    out: Path = current.out
    temporary = out / f".model{TEMPORARY}"
    try:
        shutil.copytree(current.model(current.recipe.talkers[-1]), temporary)
        shutil.rmtree(out / "model", ignore_errors=True)
        temporary.rename(out / "model")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    report = evaluation.report(current)
    curves = {name: Metrics.read(current.folder(name) / "metrics.jsonl") for name in current.recipe.stages}
    traces = {name: Metrics.read(current.folder(name) / TRACES) for name in current.recipe.stages}
    write_json(out / "report.json", report)
    write_atomic(out / "report.html", report_html(report, curves, traces))
    complete(out)
    return report


def _refuse_foreign(out: Path) -> None:
    """A folder with something else in it is left alone, not even a lock is put there."""
    inside = [p.name for p in out.iterdir()] if out.is_dir() else []
    if "recipe.json" not in inside and any(name not in KEPT and not name.endswith(TEMPORARY) for name in inside):
        raise BadInput(f"{out} is not empty and not a run of this program; choose another folder.")


def _begun(out: Path) -> bool:
    """Whether a stage is done, that is, whether there is anything that another recipe would spoil."""
    return out.is_dir() and any(is_complete(p) for p in out.iterdir())


def _settle(recipe: Recipe, out: Path) -> Recipe:
    """The recipe to go on with: the folder's own where a stage of it is done, which must be the same up to what was resolved."""
    stored = read_json(out / "recipe.json")
    if stored is None or not _begun(out):
        return recipe
    asked = recipe.model_dump(mode="json")
    for key in RESOLVED_LATER:
        if asked[key] == "auto":
            asked[key] = stored.get(key)
    watched = {name: {**stored[name], "alarms": table["alarms"]} for name, table in asked.items()
               if isinstance(table, dict) and "alarms" in table and isinstance(stored.get(name), dict)}  # fmt: skip
    # Keys that are newer than the run have their defaults.
    kept = parse(stored | {key: asked[key] for key in WATCHING} | watched, str(out / "recipe.json"))
    different = differences(kept.model_dump(mode="json"), asked)
    if different:
        keys = ", ".join(different[:SHOWN]) + (f" and {len(different) - SHOWN} more" if different[SHOWN:] else "")
        raise BadInput(f"{out} holds a run of another recipe (different: {keys}); choose another folder, or --fresh to start over.")
    return kept


def _write_recipe(recipe: Recipe, out: Path) -> None:
    write_json(out / "recipe.json", recipe.model_dump(mode="json"))  # the first file of a run: by it a run is known
    write_atomic(out / "recipe.toml", to_toml(recipe))


def _set_aside(out: Path) -> None:
    """Move everything in `out` to the first free OUT.old-N; recipe.json last, so that a half-moved run is still known as one."""
    out = out.resolve()  # "." has no name
    inside = sorted((p for p in out.iterdir() if p.name not in KEPT), key=lambda p: p.name == "recipe.json")
    if inside:
        number = 1
        while (old := out.with_name(f"{out.name}.old-{number}")).exists():
            number += 1
        old.mkdir()
        set_aside(out, old)
        for path in inside:
            path.rename(old / path.name)
