"""Arithmetic with whole numbers, written as on paper: "12+7=", "34*6-12=".

Generator, trace writer, oracle and verifier in one file. A trace works as one does by hand, a column a line from the right, so that every
line is a fact about single digits: sums carry, differences borrow, products are made of one row for each digit. Each line ends with what
stands under the columns so far, so that the next one can be read off it.
"""

from __future__ import annotations

import random
from typing import Any

from pascaline.data.puzzles.base import WHITESPACE, Dial, Problem, Trace, Verdict, share, turn
from pascaline.data.puzzles.calls import call
from pascaline.data.puzzles.expression import evaluate

# operators: 1 is +, 2 is + and -, 3 is + and - and *
LEVELS = {"digits": Dial(2, 1, 9), "terms": Dial(2, 2, 6), "operators": Dial(2, 1, 3)}


def generate(rng: random.Random, **dials: Any) -> Problem:
    """`terms` numbers from 1 to all nines of `digits` digits, with operators between them. Orders of one sum have one key."""
    level = turn("arithmetic", LEVELS, dials, rng)
    numbers = [1 + int(rng.random() * (10 ** level["digits"] - 1)) for _ in range(level["terms"])]
    operators = "".join("+-*"[int(rng.random() * level["operators"])] for _ in numbers[1:])
    return write(numbers, operators)


def write(numbers: list[int], operators: str) -> Problem:
    """The problem with these numbers, and one operator between each two."""
    terms: list[tuple[str, list[int]]] = []  # of the sum: its sign and its factors
    for operator, number in zip("+" + operators, numbers, strict=True):
        if operator == "*":
            terms[-1][1].append(number)
        else:
            terms.append((operator, [number]))
    key = "".join(sorted(sign + "*".join(map(str, sorted(factors))) for sign, factors in terms))
    return Problem("arithmetic", f"{_sum(numbers, operators)}=", f"arithmetic {key}", {"numbers": numbers, "operators": operators})


def trace(problem: Problem, rng: random.Random, slip: float = 0.0) -> Trace:
    """Every operation by columns, products first; with share `slip` a column's digit is off, and the rest follows from it."""
    share("arithmetic", slip=slip)
    numbers, operators = list(problem.data["numbers"]), problem.data["operators"]
    lines: list[str] = []
    while operators:
        if len(operators) > 1:
            lines.append(_sum(numbers, operators))  # what is left
        at = max(operators.find("*"), 0)
        numbers[at : at + 2] = [_operation(numbers[at], operators[at], numbers[at + 1], Paper(lines, rng, slip))]
        operators = operators[:at] + operators[at + 1 :]
    return Trace("\n".join(lines), str(numbers[0]))


def turns(problem: Problem, environment: str, rng: random.Random) -> list[Trace]:
    """The whole sum is asked, and the result believed."""
    asked = _sum(problem.data["numbers"], problem.data["operators"])
    return [Trace("ask", call(environment, asked)), Trace("done", str(solve(problem)))]


def solve(problem: Problem) -> str | None:
    """The result, as it must be written."""
    found = evaluate(_sum(problem.data["numbers"], problem.data["operators"]))
    return str(found[0]) if found else None


def verify(problem: Problem, answer: str) -> Verdict:
    """RIGHT for exactly the digits of the result ("-32", not "-032", "+32" or "32.0"); "none" abstains."""
    answer = answer.strip(WHITESPACE)
    if answer == "none":
        return Verdict.ABSTAIN
    return Verdict.RIGHT if answer == solve(problem) else Verdict.WRONG


def _sum(numbers: list[int], operators: str) -> str:
    return str(numbers[0]) + "".join(f"{operator}{number}" for operator, number in zip(operators, numbers[1:], strict=True))


class Paper:
    """Where the lines are written, and how often a digit slips."""

    def __init__(self, lines: list[str], rng: random.Random, slip: float) -> None:
        self.lines, self.rng, self.slip = lines, rng, slip

    def digit(self, true: int) -> int:
        if self.slip and self.rng.random() < self.slip:
            return (true + 1 + int(self.rng.random() * 9)) % 10  # any other
        return true


def _operation(x: int, operator: str, y: int, paper: Paper) -> int:
    """The result as the lines find it. y is not negative, nor is x in a product."""
    said = f"{x}{operator}{y}"
    if operator == "*":
        value = _product(x, y, said, paper)
    else:  # of numbers without signs, and the larger first in a difference: -3-4 is -(3+4), 3-14 is -(14-3)
        added = y if operator == "+" else -y
        alike = (x < 0) == (added < 0)
        first, second = (x, added) if alike or abs(x) >= abs(added) else (added, x)
        easy = f"{abs(first)}{'+' if alike else '-'}{abs(second)}"
        easy = f"-({easy})" if first < 0 else easy
        paper.lines.append(said if easy == said else f"{said}={easy}")
        value = (_plus if alike else _minus)(abs(first), abs(second), paper) * (-1 if first < 0 else 1)
    paper.lines.append(f"{said}={value}")
    return value


def _columns(x: int, y: int) -> list[tuple[int, int]]:
    """Their digits, the last first; the shorter one is filled up with zeros."""
    width = max(len(str(x)), len(str(y)))
    return [(int(a), int(b)) for a, b in zip(f"{x:0{width}}"[::-1], f"{y:0{width}}"[::-1], strict=True)]


def _plus(x: int, y: int, paper: Paper) -> int:
    """Columns a+b+carry=sum,digits so far."""
    carry, below = 0, ""
    for a, b in _columns(x, y):
        before, (carry, digit) = carry, divmod(a + b + carry, 10)
        digit = paper.digit(digit)
        below = f"{digit}{below}"
        paper.lines.append(f"{a}+{b}+{before}={carry}{digit},{below}")
    return int(f"{carry}{below}")


def _minus(x: int, y: int, paper: Paper) -> int:
    """Columns a-b-borrowed=digit,digits so far; ten is added to an `a` that is too small, and borrowed from the next. x is the larger."""
    borrowed, below = 0, ""
    for a, b in _columns(x, y):
        before, borrowed = borrowed, int(a < b + borrowed)
        digit = paper.digit(10 * borrowed + a - b - before)
        below = f"{digit}{below}"
        paper.lines.append(f"{borrowed}{a}-{b}-{before}={digit},{below}")
    return int(below)


def _product(x: int, y: int, said: str, paper: Paper) -> int:
    """A row for each digit of y that is not 0, and the sum of the rows: 34*26=34*6+34*20."""
    places = [int(digit) * 10**i for i, digit in enumerate(reversed(str(y))) if digit != "0"]
    paper.lines.append(said if len(places) < 2 else f"{said}={'+'.join(f'{x}*{place}' for place in places)}")
    total = 0
    for number, place in enumerate(places):
        row = _row(x, place, paper)
        if len(places) > 1:
            paper.lines.append(f"{x}*{place}={row}")
        total = _operation(total, "+", row, paper) if number else row
    return total


def _row(x: int, place: int, paper: Paper) -> int:
    """Columns a*digit+carry=product,digits so far, for one digit and the zeros behind it."""
    factor, carry, below = int(str(place)[0]), 0, ""
    for a, _ in _columns(x, 0):
        before, (carry, digit) = carry, divmod(a * factor + carry, 10)
        digit = paper.digit(digit)
        below = f"{digit}{below}"
        paper.lines.append(f"{a}*{factor}+{before}={carry}{digit},{below}")
    return int(f"{carry}{below}") * (place // factor)
