"""Countdown: reach a target from three or four numbers, each used once, with + - * /.

Generator, trace writer, oracle and verifier in one file. Candidate lines keep every intermediate a positive whole
number of at most 99, so that a small model reads and writes two digits; the verifier does not ask for that.
A trace tries one expression a line, works it out, restates the target and says how far off it is before it judges: a tiny model
learns to subtract long before it learns to compare two numbers by itself.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

from pascaline.data.puzzles.base import WHITESPACE, Dial, Problem, Trace, Verdict, share, turn
from pascaline.data.puzzles.expression import evaluate
from pascaline.errors import BadInput

LEVELS = {"numbers": Dial(3, 3, 4), "largest": Dial(20, 4, 99)}
CEILING = 99  # of intermediates and of targets

Step = tuple[int, str, int, int]  # left, operator, right, result
Numbers = tuple[int, ...]  # sorted


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
    attempts: tuple[int, int] = (1, 6),
    planted: float = 0.35,
    false_claim: float = 0.03,
    slip: float = 0.0,
) -> Trace:
    """A search written out, one attempt a line, no attempt twice.

    The number of attempts is drawn evenly from `attempts` (both ends included). With share `planted` the last one is
    a true solution; a solution met by chance ends the search too. A search without one ends in "none" or, with share
    `false_claim`, in claiming its last attempt. With share `slip` an attempt misreads its final result.
    """
    share("countdown", planted=planted, false_claim=false_claim, slip=slip)
    low, high = attempts
    if not 1 <= low <= high:
        raise BadInput(f"puzzle 'countdown': attempts={attempts!r} must be [from, to] with 1 <= from <= to")
    numbers, target = tuple(sorted(problem.data["numbers"])), problem.data["target"]
    count = low + int(rng.random() * (high - low + 1))
    plant = rng.random() < planted and _reach(numbers) >> target & 1
    written: list[str] = []
    seen: set[tuple[Step, ...]] = set()
    forms: list[str] = []
    for number in range(1, count + 1):
        found = _walk(numbers, rng, target) if plant and number == count else _unseen(numbers, rng, seen)
        if found is None:
            break
        steps = _shown(found, rng)
        result = steps[-1][3] if not slip or rng.random() >= slip else _misread(steps[-1][3], rng)
        forms = _rewritings(steps, numbers)
        written.append(f"{'='.join(forms)}={result:02},{target:02}:{abs(result - target):02} ")
        if result == target:
            return Trace("no\n".join(written) + "yes", forms[0])
    thought = "no\n".join(written)
    if rng.random() < false_claim:
        return Trace(thought + "yes", forms[0])
    return Trace(thought + "no", "none")


def solve(problem: Problem) -> str | None:
    """A right answer with whole positive intermediates up to 99, or None when there is none."""
    numbers, target = tuple(sorted(problem.data["numbers"])), problem.data["target"]
    if not 1 <= target <= CEILING or not _reach(numbers) >> target & 1:
        return None
    return _rewritings(_walk(numbers, None, target), numbers)[0]


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


@lru_cache(maxsize=1 << 16)
def _moves(numbers: Numbers) -> tuple[tuple[Step, Numbers], ...]:
    """Every legal first step on these numbers, with the numbers left after it. There is always at least one."""
    moves: list[tuple[Step, Numbers]] = []
    pairs = set()
    for i in range(1, len(numbers)):
        for j in range(i):
            big, small = numbers[i], numbers[j]
            if (big, small) in pairs:
                continue
            pairs.add((big, small))
            rest = numbers[:j] + numbers[j + 1 : i] + numbers[i + 1 :]
            results = [("+", big + small), ("-", big - small), ("*", big * small)]
            if big % small == 0:
                results.append(("/", big // small))
            for operator, value in results:
                if 0 < value <= CEILING:
                    moves.append(((big, operator, small, value), tuple(sorted((*rest, value)))))
    return tuple(moves)


@lru_cache(maxsize=1 << 17)
def _reach(numbers: Numbers) -> int:
    """The values that can be reached, as a bit mask: bit v is set if v can."""
    if len(numbers) == 1:
        return 1 << numbers[0]
    mask = 0
    for _, rest in _moves(numbers):
        mask |= _reach(rest)
    return mask


def _walk(numbers: Numbers, rng: random.Random | None, target: int | None = None) -> list[Step]:
    """Random legal steps until one number is left; with a target only steps from which it can still be reached.

    Without rng the first such step each time.
    """
    steps = []
    while len(numbers) > 1:
        moves = _moves(numbers)
        if target is not None:
            moves = tuple(move for move in moves if _reach(move[1]) >> target & 1)
        step, numbers = moves[int(rng.random() * len(moves)) if rng else 0]
        steps.append(step)
    return steps


def _unseen(numbers: Numbers, rng: random.Random, seen: set[tuple[Step, ...]]) -> list[Step] | None:
    """A random attempt that is not in `seen` (the order of independent steps does not make it another)."""
    for _ in range(50):
        steps = _walk(numbers, rng)
        name = tuple(sorted(steps))
        if name not in seen:
            seen.add(name)
            return steps
    return None  # few numbers and many attempts: all have been seen


def _shown(steps: list[Step], rng: random.Random) -> list[Step]:
    """The steps with the operands of + and * in random order."""
    return [(y, op, x, value) if op in "+*" and rng.random() < 0.5 else (x, op, y, value) for x, op, y, value in steps]


def _misread(value: int, rng: random.Random) -> int:
    """Another result near the true one."""
    near = [n for n in range(max(1, value - 10), min(CEILING, value + 10) + 1) if n != value]
    return near[int(rng.random() * len(near))]


def _rewritings(steps: list[Step], numbers: Numbers) -> list[str]:
    """The steps as one expression, then the same with one step after the other worked out, but for the last.

    13-1=12, 12*2=24 gives ["(13-1)*2", "12*02"]. Worked-out forms write two digits, so that results always stand in the same places.
    """
    pool: list[tuple[int, Any]] = [(number, None) for number in numbers]

    def take(value: int) -> tuple[int, Any]:
        index = max(i for i, (have, _) in enumerate(pool) if have == value)  # the newest: a result before a number
        return pool.pop(index)

    for order, (x, op, y, value) in enumerate(steps):
        left, right = take(x), take(y)
        pool.append((value, (order, left, op, right)))

    def write(node: tuple[int, Any], done: int) -> str:
        value, step = node
        if step is None or step[0] < done:
            return f"{value:02}" if done else str(value)
        return f"({write(step[1], done)}{step[2]}{write(step[3], done)})"

    return [write(pool[0], done)[1:-1] for done in range(len(steps))]
