"""A suite: which tasks are put to a model, and how. From a TOML file, from the command line, or from the result of an earlier one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, collection
from pascaline.data.puzzles.families import Family
from pascaline.errors import BadInput, describe_validation, nearest
from pascaline.eval.plan import Plan, Task
from pascaline.post import verifiers
from pascaline.tables import Puzzle

# Kinds that are no family of problems: where the function stands that measures.
TASKS = {
    "ppl": "pascaline.eval.perplexity:perplexity",
    "niah": "pascaline.eval.niah:niah",
    "mqar": "pascaline.eval.mqar:mqar",
    "lm": "pascaline.eval.lm:task",
    "unanswerable": "pascaline.eval.probes:unanswerable",
    "refusal": "pascaline.eval.probes:refusal",
    "system": "pascaline.eval.probes:system",
    "honesty": "pascaline.eval.honesty:honesty",
}
FILES = {"gsm8k": "integer", "file": ""}  # kinds of problems from a file, and the verifier unless dials.verifier names one
QUESTIONS = "pascaline.eval.questions:questions"  # of all families of problems
KEYS = ("name", "about", "defaults", "tasks")  # of a suite's file


@dataclass(frozen=True)
class Suite:
    """Its name and its tasks, which have different labels."""

    name: str
    plans: tuple[Plan, ...]

    def told(self) -> dict[str, Any]:
        """As a result holds it."""
        return {"name": self.name, "tasks": [plan.model_dump() for plan in self.plans]}


def named(tasks: str, settings: Mapping[str, Any]) -> Suite:
    """From the command line: `countdown,gsm8k:FILE`, with the same settings for each."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return _suite("", [{"task": name} for name in names], settings, "--tasks")


def load(path: str | Path, settings: Mapping[str, Any] | None = None) -> Suite:
    """From a .toml file, or from a result's .json, which holds its suite. settings: instead of what the file says of each task."""
    path = Path(path)
    raw = _read(path)
    if path.suffix == ".json":
        raw = raw["suite"] if isinstance(raw.get("suite"), dict) else raw
        tasks = raw.get("tasks")
        if not isinstance(tasks, list):
            raise BadInput(f"{path} is not the result of an evaluation: it holds no suite.")
        return _suite(str(raw.get("name") or ""), tasks, settings or {}, str(path))
    for key in raw:
        if key not in KEYS:
            raise BadInput(f"{path}: {key} is not a known key{nearest(key, KEYS) or '.'}")
    tasks, defaults = raw.get("tasks", []), raw.get("defaults", {})
    if not isinstance(tasks, list) or not isinstance(defaults, dict) or not all(isinstance(task, dict) for task in tasks):
        raise BadInput(f"{path}: a suite has a table [defaults] and tables [[tasks]].")
    allowed = [key for key in Plan.model_fields if key not in ("task", "name", "sha256")]
    for key in defaults:
        if key not in allowed:
            raise BadInput(f"{path}: defaults.{key} is not a known key{nearest(key, allowed) or '.'}")
    return _suite(str(raw.get("name") or path.stem), [{**defaults, **task} for task in tasks], settings or {}, str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise BadInput(f"there is no suite {path}{nearest(str(path), siblings) or '.'}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise BadInput(f"{path} is not a suite: it must be a .toml file, or the .json of a result.") from None
    except ValueError as error:  # of either format
        raise BadInput(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}.") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is not the result of an evaluation: it holds no JSON object.")
    return found


def _suite(name: str, tasks: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], where: str) -> Suite:
    plans = [_plan({**task, **settings}, f"{where}: task {number}") for number, task in enumerate(tasks, 1)]
    if not plans:
        raise BadInput(f"{where} names no task; for one: countdown.")
    twice = [label for label, times in Counter(plan.label for plan in plans).items() if times > 1]
    if twice:
        raise BadInput(f"{where}: two tasks are called {twice[0]}; give one of them a name.")
    return Suite(name, tuple(plans))


def _plan(raw: Mapping[str, Any], where: str) -> Plan:
    where = f"{where} ({raw['task']})" if isinstance(raw.get("task"), str) else where
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as error:
        raise BadInput(describe_validation(error, where, Plan.model_fields)) from None
    return plan.model_copy(update={"sha256": _checked_file(plan)})


def _checked_file(plan: Plan) -> str:
    """The hash of the argument's file, "" where it names none. BadInput for one that is missing, empty or not the same any more."""
    needed = plan.kind in FILES or plan.kind == "ppl"
    path = Path(plan.argument.partition(":")[2] if plan.kind in ("niah", "honesty") else plan.argument).expanduser()
    if needed and not plan.argument:
        raise BadInput(f"task '{plan.task}' needs a file: {plan.kind}:FILE.")
    if not plan.argument or not path.is_file():
        if needed and not (plan.kind == "ppl" and path.is_dir()):
            raise BadInput(f"task '{plan.task}': there is no file {plan.argument}.")
        return ""
    if not path.stat().st_size:
        raise BadInput(f"task '{plan.task}': {plan.argument} is empty.")
    with open(path, "rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if plan.sha256 and plan.sha256 != found:
        raise BadInput(
            f"task '{plan.task}': {plan.argument} is not the file that the suite was made with (sha256 {found[:12]}..., "
            f"not {plan.sha256[:12]}...), so that the numbers would not compare."
        )
    return found


# ---- what a task's name stands for -----------------------------------------------------------------------------------


def task_of(plan: Plan) -> Task:
    """The function that measures it. BadInput for a name that stands for nothing, and for settings that fit no problem, so that both are
    said before a model is loaded."""
    path = TASKS.get(plan.kind)
    if path is None:
        problems(plan, at_most=1)
    module, _, function = (path or QUESTIONS).partition(":")
    try:
        found: Task = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise BadInput(f"task '{plan.task}' is not in this version of pascaline ({module} is missing).") from None
    return found


def problems(plan: Plan, at_most: int | None = None) -> list[Problem]:
    """What is asked: all rows of a file in a seeded order, or the held-out side of a puzzle; plan.problems of them, or as many as there
    are. No two are equal, and a longer list begins like a shorter one."""
    count = min(plan.problems, at_most or plan.problems)
    if plan.kind in FILES:
        rows = _file(plan).side(held_out=True)
        return collection.drawn(rows, count, plan.seed, again=False)
    _refuse_unknown(plan.task)
    found: dict[str, Problem] = {}
    repeats = 0
    try:
        for problem in puzzles.draw(plan.task, plan.seed, held_out=True, **plan.dials):
            repeats = repeats + 1 if problem.key in found else 0
            found.setdefault(problem.key, problem)
            if len(found) == count or repeats * puzzles.HELD_OUT_ONE_IN > puzzles.PATIENCE:
                break
    except TypeError as error:  # a plugin's generate without that dial
        raise BadInput(f"task '{plan.label}': dials {plan.dials} do not fit: {error}.") from None
    return list(found.values())


def _file(plan: Plan) -> Family:
    dials = {"verifier": FILES[plan.kind], **plan.dials}
    unknown = [key for key in dials if key not in ("verifier", "columns")]
    if unknown:
        raise BadInput(f"task '{plan.label}' has no dial '{unknown[0]}', only verifier and columns.")
    if not dials["verifier"]:
        raise BadInput(f"task '{plan.label}' has no verifier: say in a suite's file who judges the answers, dials = {{verifier = ...}}.")
    verifiers.get(dials["verifier"])
    path = str(Path(plan.argument).expanduser())
    # As a test file it is held out as a whole.
    return Family(plan.kind, Puzzle(file=path, test=path, verifier=dials["verifier"], columns=dials.get("columns", {})))


def _refuse_unknown(task: str) -> None:
    """puzzles.get says what is wrong with a puzzle; here the other kinds are known too."""
    kind, colon, _ = task.partition(":")
    plugins = [point.name for point in entry_points(group=puzzles.GROUP)]
    if task in puzzles.BUILT_IN or task in plugins or (colon and kind in ("gym", "grade")):
        return
    if colon and kind and importlib.util.find_spec(kind.partition(".")[0]):
        return  # a module:function, which there may be
    known = [*puzzles.BUILT_IN, *plugins, *TASKS, *FILES]
    hint = nearest(kind, [*known, "gym", "grade"])
    raise BadInput(f"there is no task '{task}'{hint or '.'} There are {', '.join(known)}, gym:FAMILY, grade:PUZZLE and module:function.")
