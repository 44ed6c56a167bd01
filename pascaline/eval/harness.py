"""Put a suite to models, one after the other, and write down what came of it so that it can be done again.

A result is JSON: {"suite": as asked for, "models": [{"name", "path", "sha256": of each file that decides the numbers, "config", "dtype",
"device", "plain", "tasks": {label: measurement with "plan", "tokens", "seconds"}}], "versions", "machine"}.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.errors import BadInput, nearest
from pascaline.eval import suite as suites
from pascaline.eval.plan import Plan, Task
from pascaline.eval.suite import Suite, task_of
from pascaline.progress import Progress
from pascaline.recipe import differences
from pascaline.runs import machine, plain, read_json, versions, write_json
from pascaline.stopping import Interrupt

if TYPE_CHECKING:
    from pascaline.engine import Engine

DECISIVE = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # beside the weights
PLAIN_STAGES = ("pretrain", "extend")  # whose models have seen no chat
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Subject:
    """A model to be asked, or (told) what was measured of one already. plain: asked as plain text whatever the suite says."""

    name: str
    folder: Path = Path()
    plain: bool = False
    told: Mapping[str, Any] | None = None


def subjects(paths: Sequence[str | Path], stages: bool = False) -> list[Subject]:
    """What each path names: a model's folder, a run's (its model; with stages that of every stage in their order), or a result's .json
    (all models in it, and nothing is run). BadInput for anything else, and for the same model twice."""
    found: list[Subject] = []
    for path in map(Path, paths):
        if path.suffix == ".json" and not path.is_dir():
            found += _measured(path)
        elif stages:
            found += _stages(path)
        else:
            found.append(Subject(str(path), _model_folder(path)))
    for i, one in enumerate(found):
        if one.name in [other.name for other in found[:i]]:
            raise BadInput(f"{one.name} is named twice.")
    return found


def _model_folder(path: Path) -> Path:
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        siblings = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadInput(f"there is no model {path}{nearest(str(path), siblings) or '.'}")
    raise BadInput(f"{path} is neither a model's folder nor a run's: it has no config.json and no model/config.json.")


def _stages(path: Path) -> list[Subject]:
    folders = sorted(folder.parent for folder in path.glob("[0-9][0-9]-*/model") if (folder / "config.json").is_file())
    if not folders:
        raise BadInput(f"{path} is no run's folder with models of its stages (NN-STAGE/model), which --stages evaluates.")
    return [Subject(str(f), f / "model", f.name.partition("-")[2] in PLAIN_STAGES) for f in folders]


def _measured(path: Path) -> list[Subject]:
    told = result_of(path)
    models = told["models"]
    several = len(models) > 1
    return [Subject(f"{path}: {m['name']}" if several else str(path), told={**m, "name": m["name"]}) for m in models]


def result_of(path: Path) -> dict[str, Any]:
    """A result read back. BadInput where there is none."""
    if not path.exists():
        raise BadInput(f"there is no file {path}.")
    told = read_json(path)
    models = told.get("models") if told else None
    if told is None or not isinstance(models, list) or not models or not all(isinstance(m, dict) and "tasks" in m for m in models):
        raise BadInput(f"{path} is not the result of an evaluation (pascaline eval --out writes one).")
    return told


def choose(tasks: str | None, suite: Path | None, paths: Sequence[Path], settings: Mapping[str, Any]) -> Suite:
    """The suite that the command line asks for; without a word of it that of the first result among the models. Results alone need none."""
    if tasks is not None and suite is not None:
        raise BadInput("--tasks and --suite each say what is asked; give one of them.")
    if tasks is not None:
        return suites.named(tasks, settings)
    results = [path for path in paths if path.suffix == ".json"]
    if suite is None and len(results) == len(paths):
        return Suite("", ())
    if suite is None and not results:
        raise BadInput("say what to ask: --tasks countdown, or --suite suites/small.toml.")
    return suites.load(suite or results[0], settings)


# ---- running ---------------------------------------------------------------------------------------------------------


def run(
    suite: Suite, models: Sequence[Subject], out: Path | None = None, device: str = "auto", dtype: str = "float32", quiet: bool = False
) -> dict[str, Any]:
    """The result of the suite for these models. With `out` it is written there after every task, and what is there already is not asked
    again. BadInput, before a model is loaded, for a task that cannot be asked and for an `out` of another suite or of other weights."""
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype} is not known, only float32 and bfloat16.")
    tasks = {plan.label: task_of(plan) for plan in suite.plans}
    result: dict[str, Any] = {"suite": suite.told(), "models": [], "versions": versions(), "machine": machine()}
    if out is not None and out.exists():
        result = _begun(result, out)
    with Interrupt() as interrupt:
        for subject in models:
            if subject.told is not None:
                _put(result, {**subject.told, "name": subject.name})
                continue
            entry = _entry(result, subject, dtype, out)
            plans = [p.model_copy(update={"plain": subject.plain or p.plain}) for p in suite.plans if p.label not in entry["tasks"]]
            _check_chat(subject, plans)
            if plans:
                _model(subject, plans, tasks, entry, Keeper(result, out, interrupt, quiet), device, dtype)
    order = [subject.name for subject in models]
    result["models"].sort(key=lambda m: order.index(m["name"]) if m["name"] in order else len(order))
    return plain(result)


@dataclass
class Keeper:
    """Where finished tasks go, and who may stop the others."""

    result: dict[str, Any]
    out: Path | None
    interrupt: Interrupt
    quiet: bool

    def save(self) -> None:
        if self.out is not None:
            write_json(self.out, self.result)

    def stop(self, label: str) -> None:
        """Raises Stopped if the user wants it."""
        if self.interrupt.requested:
            kept = f"; finished tasks are in {self.out}" if self.out else ", and nothing is kept without --out FILE"
            stopped = self.interrupt.stopped(f"stopped in task {label}{kept}")
            stopped.resumable = self.out is not None
            raise stopped


def _model(
    subject: Subject, plans: Sequence[Plan], tasks: Mapping[str, Task], entry: dict[str, Any], keep: Keeper, device: str, dtype: str
) -> None:
    """Ask one model what is left, and put it into the entry."""
    engine = _engine(subject.folder, device, dtype)
    entry |= {"config": _config(engine), "device": _device(engine)}
    _put(keep.result, entry)
    for plan in plans:
        found = _task(engine, plan, tasks[plan.label], f"{_short(subject.name)} {plan.label}", keep)
        entry["tasks"][plan.label] = found
        keep.save()
        keep.stop(plan.label)


def _task(engine: Engine, plan: Plan, task: Task, shown: str, keep: Keeper) -> dict[str, Any]:
    engine.flush()  # what earlier tasks left in the cache must not decide a rounding
    before, began = engine.stats.generated + engine.stats.prefilled, time.perf_counter()
    with Progress(shown, plan.problems, "problem", enabled=not keep.quiet) as progress:

        def watch(done: int, total: int) -> None:
            progress.total = total
            spent = engine.stats.generated + engine.stats.prefilled - before
            progress.update(done, tokens_per_s=spent / max(time.perf_counter() - began, 1e-9))
            keep.stop(plan.label)

        found = task(engine, plan, watch)
    values, keys = found.pop("values"), found.pop("keys")  # the long lists last, for who reads the file
    spent = engine.stats.generated + engine.stats.prefilled - before
    facts = {"plan": plan.model_dump(), "generated_and_read": spent, "seconds": time.perf_counter() - began}
    return {**found, **facts, "keys": keys, "values": values}


def _engine(folder: Path, device: str, dtype: str) -> Engine:
    import torch

    from pascaline.engine import Engine
    from pascaline.model import native

    engine = Engine(folder, device=device, dtype=getattr(torch, dtype))
    if engine.model.device.type == "cpu":
        native.wait()  # so that an answer does not hang on when the compiler was done
    return engine


def _config(engine: Engine) -> dict[str, Any]:
    parameters = sum(p.numel() for p in engine.model.parameters())
    return {"model_type": engine.model.config.model_type, "parameters": parameters}


def _device(engine: Engine) -> str:
    import torch

    from pascaline.device import device_name

    kind = engine.model.device
    return device_name(kind) or f"{kind.type}, {torch.get_num_threads()} threads"


def _check_chat(subject: Subject, plans: Sequence[Plan]) -> None:
    from pascaline.tokenizer import Tokenizer

    if any(not p.plain and p.kind != "ppl" for p in plans) and Tokenizer.load(subject.folder).template is None:
        raise BadInput(
            f"{subject.name} has no chat template, so that it is a base model or lacks its chat_template.jinja; --plain asks it in plain "
            "text (the problem and a new line, then what follows \"Answer: \")."
        )  # fmt: skip


# ---- what is known already -------------------------------------------------------------------------------------------


def _begun(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """The result at `out`, to be gone on with."""
    found = result_of(out) if read_json(out) else None
    if found is None:
        raise BadInput(f"{out} is there already and is no result of an evaluation; name another file.")
    for key, what in (("suite", "suite"), ("versions", "software")):
        if changed := _changed(found.get(key) or {}, plain(result[key])):
            raise BadInput(f"{out} holds results of another {what} ({', '.join(changed[:4])} differ); name another file.")
    return found


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    def flat(told: dict[str, Any]) -> dict[str, Any]:
        tasks = {task.get("name") or task["task"]: task for task in told.get("tasks", [])}
        return {**told, "tasks": tasks} if "tasks" in told else told

    return differences(flat(old), flat(new))


def _entry(result: dict[str, Any], subject: Subject, dtype: str, out: Path | None) -> dict[str, Any]:
    """The model's part of the result, with the tasks that are done."""
    facts = {"name": subject.name, "path": os.path.abspath(subject.folder), "sha256": fingerprint(subject.folder),
             "dtype": dtype, "plain": subject.plain}  # fmt: skip
    old = next((m for m in result["models"] if m["name"] == subject.name), None)
    if old is None:
        return {**facts, "tasks": {}}
    for key in ("sha256", "dtype", "plain"):
        if old[key] != facts[key]:
            what = (
                "other weights or files" if key == "sha256" else f"another {key}" if key == "dtype" else "another way of asking (--plain)"
            )
            raise BadInput(f"{out} holds results of {subject.name} with {what}; name another file.")
    return dict(old)


def _put(result: dict[str, Any], entry: dict[str, Any]) -> None:
    """Instead of the entry of that name, or behind the others."""
    for i, other in enumerate(result["models"]):
        if other["name"] == entry["name"]:
            result["models"][i] = entry
            return
    result["models"].append(entry)


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights (of one file as `sha256sum` gives it, of several over their hashes and names) and of the other files that
    decide what a model says."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{folder} has no weights (*.safetensors).")
    hashes = [_hash(file) for file in files]
    joined = "".join(f"{found}  {file.name}\n" for found, file in zip(hashes, files, strict=True))
    weights = hashes[0] if len(hashes) == 1 else sha256(joined.encode()).hexdigest()
    return {"weights": weights, **{name: _hash(folder / name) for name in DECISIVE if (folder / name).is_file()}}


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _short(name: str) -> str:
    """A path's end, for a progress bar."""
    return name if len(name) <= 32 else f"...{name[-29:]}"
