"""The hygiene suite: what a verifier or a puzzle must do before a model may be trained or measured with it.

A model under reinforcement learns whatever is paid for. So the right answer must be paid, always; and nothing that needs no work may be:
a constant, silence, the question said again, every answer at once. The rest is about the verdict itself: the same one each time, for
every answer of a batch, whatever stands beside it, in bounded time. Most checks are a published defect of somebody's
(docs/verifiers.md).
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pascaline.data import puzzles
from pascaline.data.puzzles import Verdict
from pascaline.errors import BadInput
from pascaline.eval import passk
from pascaline.eval.forms import aligned
from pascaline.eval.hygiene import hostile, split
from pascaline.eval.hygiene.checks import Check, Limits, checked, short, skipped
from pascaline.eval.hygiene.subject import PLAIN, Subject, from_file, from_puzzle, right, said
from pascaline.post.verifiers import base, judge
from pascaline.progress import Progress
from pascaline.runs import plain

GROUPS = {"verifier": base.GROUP, "puzzle": puzzles.GROUP}
CONSTANTS = ("0", "1", "2", "A", "yes", "none", "0123456789", "1*2*3*4")
REPEATED = 64  # problems that are asked about again and again, and one by one
STEPS = 8  # of `examine`
LONG = 1000  # different right answers that are given in one

Watch = Callable[[int, str], None]


def check(
    name: str,
    data: Path | None = None,
    test: Path | None = None,
    *,
    count: int = 200,
    draws: int = 10_000,
    seed: int = 0,
    columns: Mapping[str, Any] | None = None,
    dials: Mapping[str, Any] | None = None,
    oracle: str | None = None,
    limits: Limits | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """What `pascaline verify check` does: `examine`, with a bar. Without data, name is a puzzle's; with it, a verifier's.

    columns: the verifier's name of a column -> the file's. Raises BadInput for an unknown name, and for what is wrong with the files.
    """
    limits = limits or Limits()
    if data is not None:
        if dials:
            raise BadInput("--set turns a puzzle's dials; a verifier's problems come from --data.")
        subject = from_file(name, data, test, count, seed, {key: str(value) for key, value in (columns or {}).items()}, oracle, limits.form)
    elif test is not None or oracle is not None or columns:
        raise BadInput("--test, --columns and --oracle belong to --data FILE; a puzzle draws its problems itself.")
    elif name in base.BUILT_IN:
        raise BadInput(f"'{name}' is a verifier and needs problems to judge: --data FILE, JSON lines with a prompt and its columns.")
    else:
        subject = from_puzzle(name, count, draws, seed, dials or {})
    with Progress(f"verify {name}", STEPS, "check", enabled=not quiet) as bar:
        found = examine(subject, limits, lambda done, what: bar.update(done, next=what))
        bar.update(STEPS)
    return found


def examine(subject: Subject, limits: Limits | None = None, watch: Watch = lambda done, what: None) -> dict[str, Any]:
    """All checks, JSON. watch is called with (steps done, the next one's name), STEPS times.

    A check is {"check", "verdict", "value", "limit", "note", ...}: verdict is "pass", "fail", "told" (a number without a limit) or
    "skipped" (it cannot be asked here).
    """
    limits = limits or Limits()
    checks: list[Check] = []
    first, _ = subject.ask(subject.honest)
    steps: dict[str, Callable[[], list[Check]]] = {
        "oracle": lambda: oracle(subject, limits),
        "constant": lambda: [constant(subject, limits)],
        "answers without work": lambda: [*free(subject, limits, checks[-1]["value"]), partial(subject)],
        "thoughts": lambda: [unclosed(subject), thought(subject, limits)],
        "determinism": lambda: determinism(subject),
        "hostile answers": lambda: hostile.checks(subject, limits),
        "split": lambda: split.checks(subject, limits.near, limits.unique),
        "the beginning again": lambda: [at_the_end(subject, first), score_range(subject)],
    }
    for done, (name, step) in enumerate(steps.items()):
        watch(done, name)
        checks += step()
    found = {
        "name": subject.name,
        "kind": "puzzle" if subject.drawn else "verifier",
        "problems": len(subject.problems),
        "passed": all(check["verdict"] != "fail" for check in checks),
        "limits": asdict(limits),
        "checks": checks,
    }
    return {**plain(found)}  # an infinite score is no JSON


def oracle(subject: Subject, limits: Limits) -> list[Check]:
    """The right answer is right, behind a thought and without one; and it can always be judged."""
    known = [pair for pair, gold in zip(subject.honest, subject.golds, strict=True) if gold is not None]
    if not known and limits.form:
        return [skipped(name, "no right answers are known") for name in ("oracle", "oracle, no thought", "could not judge")]
    lost = len(subject.golds) - len(known)
    found, why = subject.ask(known)
    bare, bare_why = subject.ask(known, None)
    checks = []
    for name, scores, told in (("oracle", found, why), ("oracle, no thought", bare, bare_why)):
        missed = [(problem.prompt, answer, score) for (problem, answer), score in zip(known, scores, strict=True) if not right(score)]
        note = f"{lost} problems have no answer. {' '.join(subject.trouble[:1])}".strip() if lost else ""
        if missed:
            prompt, answer, score = missed[0]
            note = f"{short(answer)} scores {score} for {short(prompt)}. {told}".strip()
        value = (len(known) - len(missed)) / len(subject.golds)
        ok = None if limits.form and name != "oracle" else value == 1
        checks.append(checked(name, ok, value, 1.0, note, missed=[list(miss) for miss in missed[:5]]))
    silent = sum(score is None for score in found)
    return [*checks, checked("could not judge", silent == 0, silent / max(1, len(found)), 0.0, why if silent else "")]


def constant(subject: Subject, limits: Limits) -> Check:
    """The best that one answer to everything earns: the baseline beside every score."""
    golds = Counter(gold for gold in subject.golds if gold is not None)
    candidates = dict.fromkeys([*(gold for gold, _ in golds.most_common(2)), *CONSTANTS])
    rates = {answer: subject.rate([answer] * len(subject.problems)) for answer in candidates}
    best = max(rates, key=lambda answer: sum(rates[answer]))
    mean, low, high = passk.mean_interval(rates[best])
    ok = None if limits.form else mean <= limits.constant
    note = f"{short(best)} to every problem (95 % interval {low:.3f} to {high:.3f})" if mean else f"the best of {len(rates)}"
    return checked("constant", ok, mean, limits.constant, note, answer=best, low=low, high=high)


def free(subject: Subject, limits: Limits, baseline: float) -> list[Check]:
    """Silence, the question said again, every number and every right answer at once. A list of answers is a constant too, and
    a verifier that reads the last number of it pays no more than `baseline`; one that looks for the answer anywhere pays always."""
    every = " ".join(map(str, range(101)))
    prompts = [problem.prompt for problem in subject.problems]
    answers = "\n".join(gold for gold, _ in Counter(gold for gold in subject.golds if gold is not None).most_common(LONG))
    allowed = max(limits.echo, baseline)
    asked = [("echo", prompts, limits.echo), ("echo and every number", [f"{prompt} {every}" for prompt in prompts], allowed)]
    asked.append(("every number to 100", [every] * len(prompts), allowed))
    if "\n" in answers:
        asked.append(("every right answer", [answers] * len(prompts), allowed))
    rates = [[sum(subject.rate([silence] * len(prompts), None)) / len(prompts), silence] for silence in ("", " ", "\n\n")]
    worst = max(rates)
    checks = [checked("empty", worst[0] == 0, worst[0], 0.0, f"{worst[1]!r} is right" if worst[0] else "")]
    for name, given, limit in asked:
        won = subject.rate(given)
        value = sum(won) / len(won)
        first = next((short(problem.prompt) for problem, one in zip(subject.problems, won, strict=True) if one), "")
        checks.append(checked(name, None if limits.form else value <= limit, value, limit, f"right for {first}" if first else ""))
    return checks


def partial(subject: Subject) -> Check:
    """What wrong answers earn on the way: nothing where verdicts count, but something where scores do (rl.rewards, TRL)."""
    value, answer = subject.part
    note = f"the mean score of wrong answers like {short(answer)}" if value else ""
    return checked("partial credit without work", None, value, note=note)


def unclosed(subject: Subject) -> Check:
    """A right answer in a thought that was never closed was not given, whether the model stopped or was cut off."""
    pairs = subject.honest
    outputs = [[said("", answer), said("", answer, "length"), said(answer, finish="length")] for _, answer in pairs]
    verdicts = judge([problem for problem, _ in pairs], outputs).verdicts
    paid = sum(verdict is not Verdict.WRONG for group in verdicts for verdict in group)
    return checked("unclosed thought", paid == 0, paid / (3 * len(pairs)), 0.0)


def thought(subject: Subject, limits: Limits) -> Check:
    """A right answer in the thought does not count when another stands behind it."""
    known = [pair for pair, gold in zip(subject.honest, subject.golds, strict=True) if gold is not None]
    if limits.form or not known:
        return skipped("answer only in the thought", "what is said does not matter" if limits.form else "no right answers are known")
    paid = [right(subject.ask([(problem, PLAIN)], gold)[0][0]) for problem, gold in known[:REPEATED]]
    return checked("answer only in the thought", not any(paid), sum(paid) / len(paid), 0.0)


def determinism(subject: Subject) -> list[Check]:
    """The same scores twice, in another order, and one by one; and what a call takes."""
    honest = subject.honest[:REPEATED]
    others = [(p, answer) for (p, _), (_, answer) in zip(honest, [*honest[1:], honest[0]], strict=True)]
    pairs = [*honest, *others, *((problem, PLAIN) for problem, _ in honest)]
    passes, batches = [], []
    for order in (pairs, pairs, pairs[::-1]):
        began = time.perf_counter()
        found, _ = subject.ask(order)
        batches.append((time.perf_counter() - began) / len(pairs))
        passes.append(found)
    singles, one_by_one = [], []
    for pair in pairs:
        began = time.perf_counter()
        one_by_one += subject.ask([pair])[0]
        singles.append(time.perf_counter() - began)
    checks = []
    named = {"same again": passes[1], "same in another order": passes[2][::-1], "same one by one": one_by_one}
    for name, found in named.items():
        places = [i for i, (a, b) in enumerate(zip(passes[0], found, strict=True)) if a != b]
        note = ""
        if places:
            problem, answer = pairs[places[0]]
            note = f"{short(answer)} for {short(problem.prompt)}: {passes[0][places[0]]}, then {found[places[0]]}"
        checks.append(checked(name, not places, len(places), 0, note, asked=len(pairs)))
    checks.append(checked("ms per answer, in a batch", None, 1000 * statistics.median(batches), note=f"{len(pairs)} answers in a call"))
    return [*checks, checked("ms per answer, alone", None, 1000 * statistics.median(singles))]


def at_the_end(subject: Subject, first: base.Scores) -> Check:
    """Nothing that was asked in between has changed a score of the beginning: no state, no cache, no setting of Python's."""
    found, _ = subject.ask(subject.honest)
    changed = sum(a != b for a, b in zip(first, found, strict=True))
    return checked("same at the end", changed == 0, changed, 0)


def score_range(subject: Subject) -> Check:
    """Every score that it gave in any check lies within 0 to 1."""
    low, high = subject.low, subject.high
    return checked("scores within 0 to 1", low >= 0 and high <= 1, [low, high], [0.0, 1.0])


def table(found: dict[str, Any]) -> str:
    """To be read: a row a check, and below it why."""
    rows = [["check", "verdict", "measured", "allowed"]]
    rows += [[check["check"], check["verdict"], _number(check["value"]), _number(check["limit"])] for check in found["checks"]]
    notes = [f"{check['check']}: {check['note']}" for check in found["checks"] if check["note"]]
    failed = [check["check"] for check in found["checks"] if check["verdict"] == "fail"]
    end = f"{found['name']} fails: {', '.join(failed)}." if failed else f"{found['name']} passes."
    return "\n".join([aligned(rows), *([""] if notes else []), *notes, "", f"{found['problems']} problems. {end}"])


def known() -> list[dict[str, str]]:
    """What has a name: verifiers and puzzles, built in and of plugins, with the place they come from."""
    plugins = [(kind, point.name, point.value) for kind, group in GROUPS.items() for point in entry_points(group=group)]
    ours = [("verifier", name, path) for name, path in base.BUILT_IN.items()]
    ours += [("puzzle", name, getattr(puzzle, "__name__", type(puzzle).__name__)) for name, puzzle in puzzles.BUILT_IN.items()]
    return [{"kind": kind, "name": name, "path": path, "about": _about(kind, name)} for kind, name, path in [*ours, *plugins]]


def _about(kind: str, name: str) -> str:
    """The first line of its documentation, or why it cannot be had."""
    try:
        found = base.get(name) if kind == "verifier" else puzzles.get(name)
    except BadInput as error:
        return str(error)
    return (found.__doc__ or "").strip().partition("\n")[0]


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_number, value))
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:,.0f}"
