"""Countdown: reach a target from three or four numbers, each used once, with + - * /.

Generator, trace writer, oracle and verifier in one file. Candidate lines keep every intermediate a positive whole
number of at most 99, so that a small model reads and writes two digits; the verifier does not ask for that.
A trace tries one expression a line, works it out, restates the target and says how far off it is before it judges: a tiny model
learns to subtract long before it learns to compare two numbers by itself. Attempts follow each other in a fixed order, so that what comes
next can be read off the last line: a model that draws them at random cannot remember what it has tried, and repeats itself.
Claims can be graded (base.Gradable): of an attempt a grader reads the answer alone, for nothing else is claimed.
"""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

from pascaline.data.puzzles.base import RIGHT, WHITESPACE, Dial, Problem, Trace, Verdict, share, turn
from pascaline.data.puzzles.calls import call
from pascaline.data.puzzles.expression import evaluate, rewritten
from pascaline.errors import BadInput

LEVELS = {"numbers": Dial(3, 3, 4), "largest": Dial(20, 4, 99)}
CEILING = 99  # of intermediates and of targets
PRIME = 2**61 - 1
GRADED = ("answer",)

Numbers = tuple[int, ...]  # sorted


class Node(NamedTuple):
    """A number or the result of a step (its place in the order of steps, left, operator, right), and the name of its expression."""

    value: int
    name: int
    step: tuple[int, Node, str, Node] | None = None


def generate(rng: random.Random, **dials: Any) -> Problem:
    """Numbers drawn from 1..largest, and a target drawn evenly from all that can be reached from them."""
    level = turn("countdown", LEVELS, dials, rng)
    numbers = tuple(sorted(1 + int(rng.random() * level["largest"]) for _ in range(level["numbers"])))
    reach = _reach(numbers)
    targets = [value for value in range(1, CEILING + 1) if reach >> value & 1]
    target = targets[int(rng.random() * len(targets))]
    return Problem(
        puzzle="countdown",
        prompt=f"Make {target} from {', '.join(map(str, numbers))}.",
        key=f"countdown {' '.join(map(str, numbers))} = {target}",
        data={"numbers": list(numbers), "target": target},
    )


def trace(
    problem: Problem,
    rng: random.Random,
    attempts: int = 12,
    give_up: float = 0.25,
    planted: float = 0.35,
    false_claim: float = 0.03,
    slip: float = 0.0,
) -> Trace:
    """A search written out, one attempt a line: a stretch of `_attempts`, which lists every one in a fixed order.

    It starts anywhere in that list. After each failed attempt it gives up with chance `give_up`, after `attempts` of them in any case.
    With share `planted` the start is such that the last attempt it has patience for is a solution. A solution met earlier ends the
    search. A search without one ends in "none" or, with share `false_claim`, in claiming its last attempt. With share `slip` an
    attempt misreads its final result.
    """
    share("countdown", give_up=give_up, planted=planted, false_claim=false_claim, slip=slip)
    if attempts < 1:
        raise BadInput(f"puzzle 'countdown': attempts={attempts!r} must be at least 1")
    numbers, target = tuple(sorted(problem.data["numbers"])), problem.data["target"]
    written: list[str] = []
    for result, forms in _stretch(numbers, target, rng, attempts, give_up, planted):
        if slip and rng.random() < slip:
            result = _misread(result, rng)
        written.append(f"{'='.join(forms)}={result:02},{target:02}:{abs(result - target):02} ")
        if result == target:
            return Trace("no\n".join(written) + "yes", forms[0])
    thought = "no\n".join(written)
    if rng.random() < false_claim:
        return Trace(thought + "yes", forms[0])
    return Trace(thought + "no", "none")


def turns(problem: Problem, environment: str, rng: random.Random, attempts: int = 7) -> list[Trace]:
    """A search in which the results of attempts are asked, not worked out; always such that the last attempt would be a solution. The first
    turn says the target, the others whether the result is it. (Seven attempts and the answer are an environment's eight turns.)"""
    numbers, target = tuple(sorted(problem.data["numbers"])), problem.data["target"]
    found, thought = [], f"{target}"
    for result, forms in _stretch(numbers, target, rng, attempts, give_up=0.25, planted=1.0):
        found.append(Trace(thought, call(environment, forms[0])))
        thought = f"{target}:{abs(result - target)} {'yes' if result == target else 'no'}"
        if result == target:
            return [*found, Trace(thought, forms[0])]
    return [*found, Trace(thought, "none")]


def _stretch(
    numbers: Numbers, target: int, rng: random.Random, attempts: int, give_up: float, planted: float
) -> list[tuple[int, tuple[str, ...]]]:
    """The attempts of one search, in their order, those behind a solution too."""
    every = _attempts(numbers)
    patience = 1
    while patience < attempts and rng.random() >= give_up:
        patience += 1
    start = int(rng.random() * len(every))
    if rng.random() < planted:
        hits = [i for i, (value, _) in enumerate(every) if value == target]
        start = hits[int(rng.random() * len(hits))] - patience + 1 if hits else start
    return [every[(start + number) % len(every)] for number in range(min(patience, len(every)))]


def solve(problem: Problem) -> str | None:
    """A right answer with whole positive intermediates up to 99, or None when there is none."""
    numbers, target = tuple(sorted(problem.data["numbers"])), problem.data["target"]
    return next((forms[0] for value, forms in _attempts(numbers) if value == target), None)


def verify(problem: Problem, answer: str) -> Verdict:
    """RIGHT if the answer uses exactly the given numbers, each once, and equals the target exactly.

    Any such expression counts, whatever its intermediates. "none" abstains; all else is WRONG.
    """
    answer = answer.strip(WHITESPACE)
    if answer == "none":
        return Verdict.ABSTAIN
    read = evaluate(answer)
    if read is None or sorted(read[1]) != sorted(problem.data["numbers"]):
        return Verdict.WRONG
    return Verdict.RIGHT if read[0] == problem.data["target"] else Verdict.WRONG


def attempt(problem: Problem, rng: random.Random) -> Trace:
    """A claim to be graded, without a thought: half are right, 3 in 10 come near the target, the others have a wrong number or lack one,
    and a few are no expression, or "none"."""
    numbers, target = tuple(sorted(problem.data["numbers"])), problem.data["target"]
    kind = rng.random()
    if kind < 0.8:
        return Trace("", _near(numbers, target, hit=kind < 0.5, rng=rng))
    if kind < 0.96:
        at = int(rng.random() * len(numbers))
        other = [n for n in range(max(1, numbers[at] - 5), numbers[at] + 6) if n != numbers[at]]
        instead = (other[int(rng.random() * len(other))],) if rng.random() < 0.8 else ()
        changed = tuple(sorted((*numbers[:at], *instead, *numbers[at + 1 :])))
        return Trace("", _near(changed, target, hit=True, rng=rng))
    claim = _near(numbers, target, hit=True, rng=rng)
    return Trace("", "none" if kind < 0.98 else claim.replace(")", "", 1) if ")" in claim else f"{claim}+")


def check(problem: Problem, thought: str, answer: str) -> str:
    """RIGHT, or what is wrong with the answer: "none" claims nothing, "unreadable" is no expression with a value, "numbers": it does not
    use exactly the given ones, "makes N": its value is N (5, -5 or 5/2) and not the target."""
    return _graded(problem, answer.strip(WHITESPACE))[1]


def review(problem: Problem, thought: str, answer: str) -> str:
    """The answer, each number that it uses and those of the given ones that are left for it; then it is worked out as in a trace:

    (13-1)*2:13 of 1 2 13, 1 of 1 2, 2 of 2 ok
    (13-1)*2=12*02=24,24:00 yes
    """
    return "\n".join(_graded(problem, answer.strip(WHITESPACE))[0])


def _graded(problem: Problem, answer: str) -> tuple[list[str], str]:
    """The lines of the review, and the grade."""
    read = evaluate(answer)
    if read is None:
        return ([], "none") if answer == "none" else (["no value"], "unreadable")
    written, left, found = rewritten(answer), sorted(problem.data["numbers"]), list[str]()
    for number in read[1]:
        found.append(f"{number} of {' '.join(map(str, left)) or '-'}")
        if number not in left:
            return [f"{written[0]}:{', '.join(found)} no"], "numbers"
        left.remove(number)
    used = f"{written[0]}:{', '.join(found)}"
    if left:
        return [f"{used}, left {' '.join(map(str, left))} no"], "numbers"
    target = problem.data["target"]
    off = abs(read[0] - target)
    worked = f"{'='.join(written)},{target:02}:{off.numerator:02}" + (f"/{off.denominator}" if off.denominator > 1 else "")
    lines = [f"{used} ok", f"{worked} {'no' if off else 'yes'}"]
    return lines, f"makes {read[0]}" if off else RIGHT


def _near(numbers: Numbers, target: int, hit: bool, rng: random.Random) -> str:
    """An expression that makes the target, or comes as near as can be, if `hit`; else one of the six that come nearest without it."""
    distances = [(abs(value - target), forms[0]) for value, forms in _attempts(numbers)]
    least = min(distances)[0]
    fit = [form for off, form in distances if off == least] if hit else [form for off, form in sorted(distances) if off][:6]
    return fit[int(rng.random() * len(fit))]


def _results(x: int, y: int) -> list[tuple[str, int]]:
    """What x >= y > 0 give: positive whole numbers up to CEILING, at least one."""
    results = [("+", x + y), ("-", x - y), ("*", x * y), ("/", x // y if x % y == 0 else 0)]
    return [(operator, value) for operator, value in results if 0 < value <= CEILING]


@lru_cache(maxsize=1 << 17)
def _reach(numbers: Numbers) -> int:
    """The values that can be reached, as a bit mask: bit v is set if v can."""
    if len(numbers) == 1:
        return 1 << numbers[0]
    mask = 0
    for i, j in combinations(range(len(numbers)), 2):
        rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
        for _, value in _results(numbers[j], numbers[i]):
            mask |= _reach(tuple(sorted((*rest, value))))
    return mask


@lru_cache(maxsize=1 << 11)
def _attempts(numbers: Numbers) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Every way to use all the numbers, each once: its result and its rewritings. In a fixed order: by the first step, then by the
    second, ...; larger operands come first, and + before - before * before /. Of expressions that are always equal, as (a+b)-c
    and (a-c)+b, only the first is listed.
    """
    found: dict[int, Node] = {}

    def search(pool: list[Node]) -> None:
        if len(pool) == 1:
            found.setdefault(pool[0].name, pool[0])
        for i, j in combinations(range(len(pool)), 2):
            x, y = pool[i], pool[j]
            rest = pool[:i] + pool[i + 1 : j] + pool[j + 1 :]
            for operator, value in _results(x.value, y.value):
                node = Node(value, _name(operator, x.name, y.name), (len(numbers) - len(pool), x, operator, y))
                search(sorted([*rest, node], key=lambda node: -node.value))

    search([Node(n, random.Random(n).randrange(PRIME)) for n in sorted(numbers, reverse=True)])
    return tuple((root.value, tuple(_write(root, done)[1:-1] for done in range(len(numbers) - 1))) for root in found.values())


def _write(node: Node, done: int) -> str:
    """A node in brackets, its first `done` steps worked out, in two digits then, so that results always stand in the same places.

    (13-1)*2 with one step done is 12*02.
    """
    if node.step is None or node.step[0] < done:
        return f"{node.value:02}" if done else str(node.value)
    _, left, operator, right = node.step
    return f"({_write(left, done)}{operator}{_write(right, done)})"


def _name(operator: str, x: int, y: int) -> int:
    """An expression's value when large made-up numbers modulo a prime stand in for the given ones: equal only if always equal (or by a
    chance of about 1e-15)."""
    return {"+": x + y, "-": x - y, "*": x * y, "/": x * pow(y, -1, PRIME) if operator == "/" else 0}[operator] % PRIME


def _misread(value: int, rng: random.Random) -> int:
    """Another result near the true one."""
    near = [n for n in range(max(1, value - 10), min(CEILING, value + 10) + 1) if n != value]
    return near[int(rng.random() * len(near))]
