"""The hygiene suite: what a verifier or a puzzle must do before a model may be trained or measured with it.

A model under reinforcement learns whatever is paid for. So the right answer must be paid, always; and nothing that needs no work may be:
a constant, silence, the question said again, every answer at once. The rest is about the verdict itself: the same one each time, for
every answer of a batch, whatever stands beside it, in bounded time. Most checks are a published defect of somebody's
(docs/verifiers.md).
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.errors import BadInput
from pascaline.eval import passk, split
from pascaline.eval.hostile import look_alikes, texts
from pascaline.eval.probe import Probe
from pascaline.eval.report import aligned
from pascaline.eval.subject import PLAIN, Subject, from_file, from_puzzle, right, said
from pascaline.post.verifiers import base, judge
from pascaline.progress import Progress

GROUPS = {"verifier": base.GROUP, "puzzle": puzzles.GROUP}
CONSTANTS = ("0", "1", "2", "A", "yes", "none", "0123456789", "1*2*3*4")
REPEATED = 64  # problems that are asked about again and again, and one by one
FEW = 16
SHOWN, NOTE = 60, 300  # characters of a text in a note, and of all of it
RETRIES = 3
STEPS = 8  # of `examine`
LONG = 1000  # different right answers that are given in one

Check = dict[str, Any]
Watch = Callable[[int, str], None]


@dataclass(frozen=True)
class Limits:
    """What is still clean.

    constant: share of problems that one and the same answer may solve. 0.2 passes every family that asks for a number, and stops what is
    answered by a choice among five or fewer: that may be wanted, but then has to be said. echo: share that the question said again
    may solve (now and then its last number is the answer). near: share of test problems with a near-duplicate in training. unique: of a
    puzzle's draws that must be different. slow: how many times as long as plain text of the same length a hostile answer may take.
    seconds: what one may take in any case, which is the pool's timeout of 5 and the start of a new process. form: the verifier judges
    how an answer is written, so that what one says is the same for every problem: who pays a constant is told, and no failure.
    """

    constant: float = 0.2
    echo: float = 0.05
    near: float = 0.01
    unique: float = 0.1
    slow: float = 100.0
    seconds: float = 6.0
    form: bool = False


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
    """What `pascaline verify check` does: `examine`, with a bar. Without data, name is a puzzle's, and dials are its dials; with it, columns
    are a verifier's (its name -> the file's). Raises BadInput for an unknown name, and for what is wrong with the files."""
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
    steps: dict[str, Callable[[], list[Check]]] = {
        "oracle": lambda: oracle(subject, limits),
        "constant": lambda: [constant(subject, limits)],
        "answers without work": lambda: free(subject, limits, checks[-1]["value"]),
        "thoughts": lambda: [unclosed(subject), thought(subject, limits)],
        "determinism": lambda: determinism(subject),
        "hostile answers": lambda: hostile(subject, limits),
        "split": lambda: split.checks(subject, limits.near, limits.unique),
        "range": lambda: [score_range(subject)],
    }
    for done, (name, step) in enumerate(steps.items()):
        watch(done, name)
        checks += step()
    return {
        "name": subject.name,
        "kind": "puzzle" if subject.drawn else "verifier",
        "problems": len(subject.problems),
        "passed": all(check["verdict"] != "fail" for check in checks),
        "limits": asdict(limits),
        "checks": checks,
    }


def checked(check: str, ok: bool | None, value: Any, limit: Any = None, note: str = "", **facts: Any) -> Check:
    """ok: None is told. The note is made fit for a terminal: a verifier's own message may repeat a hostile answer."""
    verdict = "told" if ok is None else "pass" if ok else "fail"
    note = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in note[:NOTE])
    return {"check": check, "verdict": verdict, "value": value, "limit": limit, "note": note, **facts}


def skipped(check: str, why: str) -> Check:
    return {"check": check, "verdict": "skipped", "value": None, "limit": None, "note": why}


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
            note = f"{_short(answer)} scores {score} for {_short(prompt)}. {told}".strip()
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
    note = f"{_short(best)} to every problem (95 % interval {low:.3f} to {high:.3f})" if mean else f"the best of {len(rates)}"
    return checked("constant", ok, mean, limits.constant, note, answer=best, low=low, high=high)


def free(subject: Subject, limits: Limits, baseline: float) -> list[Check]:
    """Silence, the question said again, every number and every right answer at once. A list of answers is a constant too, and
    a verifier that reads the last number of it pays no more than `baseline`; one that looks for the answer anywhere pays always."""
    every = " ".join(map(str, range(101)))
    prompts = [problem.prompt for problem in subject.problems]
    answers = ", ".join(gold for gold, _ in Counter(gold for gold in subject.golds if gold is not None).most_common(LONG))
    allowed = max(limits.echo, baseline)
    asked = [("echo", prompts, limits.echo), ("echo and every number", [f"{prompt} {every}" for prompt in prompts], allowed)]
    asked.append(("every number to 100", [every] * len(prompts), allowed))
    if len(answers.split(", ")) > 1:
        asked.append(("every right answer", [answers] * len(prompts), allowed))
    rates = [[sum(subject.rate([silence] * len(prompts), None)) / len(prompts), silence] for silence in ("", " ", "\n\n")]
    worst = max(rates)
    checks = [checked("empty", worst[0] == 0, worst[0], 0.0, f"{worst[1]!r} is right" if worst[0] else "")]
    for name, given, limit in asked:
        won = subject.rate(given)
        value = sum(won) / len(won)
        first = next((_short(problem.prompt) for problem, one in zip(subject.problems, won, strict=True) if one), "")
        checks.append(checked(name, None if limits.form else value <= limit, value, limit, f"right for {first}" if first else ""))
    return checks


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
            note = f"{_short(answer)} for {_short(problem.prompt)}: {passes[0][places[0]]}, then {found[places[0]]}"
        checks.append(checked(name, not places, len(places), 0, note, asked=len(pairs)))
    checks.append(checked("ms per answer, in a batch", None, 1000 * statistics.median(batches), note=f"{len(pairs)} answers in a call"))
    return [*checks, checked("ms per answer, alone", None, 1000 * statistics.median(singles))]


def hostile(subject: Subject, limits: Limits) -> list[Check]:
    """No hostile answer breaks the verifier, is right, or takes more than its share of time; and those beside it keep their verdicts.

    Each is first given to the verifier in another process; what hangs or ends that one is not tried here.
    """
    honest = subject.honest[:REPEATED]
    alone, _ = subject.ask(honest)
    usual = statistics.median(_seconds(subject, pair)[0] for pair in honest[:FEW])
    raised, paid, slow = list[str](), list[str](), list[str]()
    worst = 0.0, ""
    given: list[tuple[Problem, str]] = []
    with Probe(*honest[0]) as probe:
        for number, (name, text) in enumerate(texts()):
            pair = honest[number % len(honest)][0], text
            if trouble := probe.survives(*pair, limits.seconds):
                (slow if "within" in trouble else raised).append(f"{name} {trouble}")
                worst = max(worst, (limits.seconds * ("within" in trouble), name))
                continue
            given.append(pair)
            took, score, why = _seconds(subject, pair)
            worst = max(worst, (took, name))
            raised += [f"{name}: {why}"] * (" raised " in why)
            paid += [name] * (right(score) and _always_right(subject, honest, pair))
            slow += [f"{name} took {took:.2f} s"] * _too_slow(subject, pair, took, score, usual, limits)
    for (problem, _), gold in zip(honest[:FEW], subject.golds, strict=False):
        for name, text in look_alikes(gold or ""):
            found, why = subject.ask([(problem, text)])
            paid += [f"{name}, {text}"] * right(found[0])
            raised += [f"{name}: {why}"] * (" raised " in why)
    changed = _changed(subject, honest, alone, given)
    return [
        checked("hostile: raises", not raised, len(raised), 0, "; ".join(raised), which=raised),
        checked("hostile: right", None if limits.form else not paid, len(paid), 0, "; ".join(paid), which=paid),
        checked("hostile: worst ms", not slow, 1000 * worst[0], 1000 * limits.seconds, "; ".join(slow) or worst[1], which=slow),
        checked("hostile: changes its neighbours", changed == 0, changed, 0),
    ]


def _always_right(subject: Subject, honest: Sequence[tuple[Problem, str]], pair: tuple[Problem, str]) -> bool:
    """Whether it is right for problems with other answers too: the last number of a hostile text may be the answer by chance."""
    asked, text = pair
    gold = next(answer for problem, answer in honest if problem is asked)
    others = [problem for problem, answer in honest if answer != gold][:3] or [asked]
    return all(map(right, subject.ask([(problem, text) for problem in others])[0]))


def _seconds(subject: Subject, pair: tuple[Problem, str]) -> tuple[float, float | None, str]:
    began = time.perf_counter()
    found, why = subject.ask([pair])
    return time.perf_counter() - began, found[0], why


def _too_slow(subject: Subject, pair: tuple[Problem, str], took: float, score: float | None, usual: float, limits: Limits) -> bool:
    """Whether it takes longer than it may, in the best of RETRIES. A verifier that says it could not judge may have waited for its own
    timeout; one that gives a score must have got it in time."""
    if took > limits.seconds:
        return True
    if score is None or took <= limits.slow * max(usual, 0.001):
        return False
    plain = _seconds(subject, (pair[0], ("plain text " * (len(pair[1]) // 11 + 1))[: len(pair[1])]))[0]
    allowed = limits.slow * max(usual, plain, 0.001)
    return all(time_again > allowed for time_again in (took, *(_seconds(subject, pair)[0] for _ in range(RETRIES - 1))))


def _changed(subject: Subject, honest: Sequence[tuple[Problem, str]], alone: base.Scores, given: Sequence[tuple[Problem, str]]) -> int:
    """How many honest answers score otherwise when hostile ones stand between them in a batch."""
    mixed: list[tuple[Problem, str]] = []
    places = []
    for number in range(max(len(honest), len(given))):
        if number < len(honest):
            places.append(len(mixed))
            mixed.append(honest[number])
        mixed += given[number : number + 1]
    found, _ = subject.ask(mixed)
    return sum(found[place] != score for place, score in zip(places, alone, strict=True))


def score_range(subject: Subject) -> Check:
    """Every score that it gave in any check lies within 0 to 1."""
    low, high = subject.low, subject.high
    return checked("scores within 0 to 1", low >= 0 and high <= 1, [low, high], [0.0, 1.0])


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


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
