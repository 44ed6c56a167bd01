"""A chain of stages in one folder. Each stage is done once; whatever stops the chain, the same command goes on with it."""

import shutil
import time
from pathlib import Path
from typing import Any

from pascaline.errors import BadInput, nearest
from pascaline.recipe import Recipe, differences, load, to_toml
from pascaline.runs import Lock, complete, is_complete, read_json, write_atomic, write_json

RESOLVED_LATER = ("device", "dtype")  # "auto" in a recipe; a run keeps what it was resolved to


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
    with Lock(out):
        if fresh:
            _set_aside(out)
        parsed = _settle(parsed, out)
        if is_complete(out):
            return read_json(out / "report.json") or {}
        return _run(parsed, out, stage, quiet)


def finished(out: str | Path) -> bool:
    return is_complete(out)


def _run(recipe: Recipe, out: Path, until: str | None, quiet: bool) -> dict[str, Any]:
    # torch and the rooms above it load only when there is work to do.
    from pascaline.device import best_dtype, choose
    from pascaline.post import evaluation, stages

    if until is not None and until not in stages.NAMES:
        raise BadInput(f"there is no stage '{until}'{nearest(until, stages.NAMES)}; there are {', '.join(stages.NAMES)}.")
    stages.check(recipe)
    import torch

    device = choose(recipe.device)
    dtype = best_dtype(device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    recipe = recipe.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    current = stages.Run(recipe, out, device, dtype, quiet)
    _write_recipe(recipe, out)
    work = {**{name: getattr(stages, name) for name in stages.NAMES[:-1]}, "eval": evaluation.evaluate}
    for name in stages.NAMES:
        if not is_complete(current.folder(name)):
            current.folder(name).mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            summary = work[name](current)
            summary.setdefault("seconds", time.perf_counter() - began)
            stages.record(current, name, summary)
            complete(current.folder(name), summary)
        if name == until:
            return {}
    return _finish(current)


def _finish(current: Any) -> dict[str, Any]:
    """OUT/model, OUT/report.json and OUT/report.html from the stages' folders."""
    from pascaline.eval.report import report_html
    from pascaline.post import evaluation, stages
    from pascaline.runs import Metrics

    out: Path = current.out
    temporary = out / ".model.pascaline-tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(current.folder("rl") / "model", temporary)
    shutil.rmtree(out / "model", ignore_errors=True)
    temporary.rename(out / "model")
    report = evaluation.report(current)
    curves = {name: Metrics.read(current.folder(name) / "metrics.jsonl") for name in stages.NAMES}
    write_json(out / "report.json", report)
    write_atomic(out / "report.html", report_html(report, curves))
    complete(out)
    return report


def _settle(recipe: Recipe, out: Path) -> Recipe:
    """The recipe to go on with: the folder's own where it has one, which must be the same up to what was resolved."""
    stored = read_json(out / "recipe.json")
    if stored is None:
        if any(p.name != ".lock" for p in out.iterdir()):
            raise BadInput(f"{out} is not empty and not a run of this program; choose another folder.")
        return recipe
    asked = recipe.model_dump(mode="json")
    for key in RESOLVED_LATER:
        if asked[key] == "auto":
            asked[key] = stored[key]
    different = differences(stored, asked)
    if different:
        raise BadInput(f"{out} holds a run of another recipe: {', '.join(different)} differ; choose another folder, or --fresh to start over.")
    return Recipe.model_validate(stored)


def _write_recipe(recipe: Recipe, out: Path) -> None:
    write_atomic(out / "recipe.toml", to_toml(recipe))
    write_json(out / "recipe.json", recipe.model_dump(mode="json"))


def _set_aside(out: Path) -> None:
    """Move everything in `out` to the first free OUT.old-N."""
    inside = [p for p in out.iterdir() if p.name != ".lock"]
    if inside:
        number = 1
        while (old := out.with_name(f"{out.name}.old-{number}")).exists():
            number += 1
        old.mkdir()
        for path in inside:
            path.rename(old / path.name)
