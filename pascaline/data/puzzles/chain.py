"""Chained arithmetic: start with a number, add, subtract, multiply, keep two digits.

Generator, trace writer, oracle and verifier in one file. Every intermediate is reduced modulo 100, so that each step
is a fact about two-digit numbers and a slip anywhere spoils the result. Attempts can be graded, line by line (base.Gradable).
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

from pascaline.data.puzzles.base import RIGHT, WHITESPACE, Dial, Problem, Trace, Verdict, share, turn
from pascaline.data.puzzles.calls import call

LEVELS = {"steps": Dial(4, 2, 5), "modulo": Dial(100, 10, 1000)}
WORDS = {"+": "add", "-": "subtract", "*": "multiply by"}
GRADED = ("thought", "answer")
READABLE = re.compile(r"[0-9]{1,9}(?:[+*-][0-9]{1,9}=[0-9]{1,9})?")  # a line, or an answer


def generate(rng: random.Random, **dials: Any) -> Problem:
    """A start below the modulus, then `steps` operations with an operand from 2 to 9."""
    level = turn("chain", LEVELS, dials, rng)
    start, modulo = int(rng.random() * level["modulo"]), level["modulo"]
    drawn = [("+-*"[int(rng.random() * 3)], 2 + int(rng.random() * 8)) for _ in range(level["steps"])]
    said = ", ".join(f"{WORDS[operator]} {operand}" for operator, operand in drawn)
    steps = [list(step) for step in drawn]  # lists, as JSON gives them back
    prompt = f"Start with {start}, {said}. Result modulo {modulo}?"
    key = " ".join(prompt.lower().split())
    return Problem("chain", prompt, key, {"start": start, "steps": steps, "modulo": modulo})


def trace(problem: Problem, rng: random.Random, slip: float = 0.1, direct: float = 0.3, lucky: float = 0.25) -> Trace:
    """One step a line; with share `slip` a step's result is off, and the rest follows from it.

    With share `direct` there is no thought but a guess, which is right with share `lucky` and else any number.
    """
    share("chain", slip=slip, direct=direct, lucky=lucky)
    modulo, value = problem.data["modulo"], problem.data["start"]
    if rng.random() < direct:
        return Trace("", str(_result(problem) if rng.random() < lucky else int(rng.random() * modulo)))
    lines = []
    for operator, operand in problem.data["steps"]:
        result = _apply(value, operator, operand, modulo)
        if rng.random() < slip:
            result = (result + 1 + int(rng.random() * (modulo - 1))) % modulo  # any other number
        lines.append(f"{value}{operator}{operand}={result}")
        value = result
    return Trace("\n".join(lines), str(value))


def turns(problem: Problem, environment: str, rng: random.Random) -> list[Trace]:
    """Each step is asked; what is left of its result modulo the modulus is the model's own thought."""
    modulo, value = problem.data["modulo"], problem.data["start"]
    found, thought = [], f"{value}"
    for operator, operand in problem.data["steps"]:
        found.append(Trace(thought, call(environment, f"{value}{operator}{operand}")))
        value = _apply(value, operator, operand, modulo)
        thought = f"{value} is left"
    return [*found, Trace(thought, str(value))]


def solve(problem: Problem) -> str | None:
    """The result, as it must be written."""
    return str(_result(problem))


def verify(problem: Problem, answer: str) -> Verdict:
    """RIGHT for exactly the digits of the result ("32", not "032", "+32" or "32.0"); "none" abstains."""
    answer = answer.strip(WHITESPACE)
    if answer == "none":
        return Verdict.ABSTAIN
    return Verdict.RIGHT if answer == solve(problem) else Verdict.WRONG


def attempt(problem: Problem, rng: random.Random) -> Trace:
    """A trace to be graded, half of them right. Most faults are slips; in one of seven attempts a step is misread, a line is missing or
    stands twice, or the answer is not the last result."""
    slip = 1 - 0.6 ** (1 / len(problem.data["steps"]))
    tried = trace(problem, rng, slip, direct=0.1, lucky=0.5)
    if rng.random() < 6 / 7 or not tried.thought:
        return tried
    lines, kind = tried.thought.split("\n"), int(rng.random() * 4)
    at = int(rng.random() * len(lines))
    if kind == 0:
        steps = [list(step) for step in problem.data["steps"]]
        steps[at][1] = 2 + (steps[at][1] - 1 + int(rng.random() * 7)) % 8  # another operand
        return trace(replace(problem, data={**problem.data, "steps": steps}), rng, slip=0.0, direct=0.0)
    if kind == 1:
        modulo = problem.data["modulo"]
        return Trace(tried.thought, str((int(tried.answer) + 1 + int(rng.random() * (modulo - 1))) % modulo))
    lines[at : at + 1] = [lines[at]] * 2 if kind == 2 else []
    return Trace("\n".join(lines), tried.answer)


def check(problem: Problem, thought: str, answer: str) -> str:
    """RIGHT, "line N" for the first line that is not the problem's next step, rightly worked out and written, or is missing or too much,
    or "answer" where the lines are sound and the answer is another. An attempt without a thought is graded by its answer alone."""
    return _graded(problem, thought, answer)[1]


def review(problem: Problem, thought: str, answer: str) -> str:
    """Each line of the attempt, the step worked out anew, and how far the two results are from each other, up to the first line that
    differs; at the end the result and the answer: "2 37*4=46,37*4:7*4+0=28,3*4+2=14:48,46:02 no". "?" stands for what cannot be read, "-"
    for what is not there.

    The line comes first, and the step by columns: a tiny model that has the line's own form to write copies the line instead of working it
    out, and one that has worked it out copies that instead of the line; either finds every attempt right (docs/log.md).
    """
    return "\n".join(_graded(problem, thought, answer)[0])


def _graded(problem: Problem, thought: str, answer: str) -> tuple[list[str], str]:
    """The lines of the review, and the grade."""
    said = thought.strip(WHITESPACE).split("\n") if thought.strip(WHITESPACE) else []
    value, steps, written = problem.data["start"], problem.data["steps"], list[str]()
    for number, (operator, operand) in enumerate(steps, 1):
        result = _apply(value, operator, operand, problem.data["modulo"])
        worked = f"{value}{operator}{operand}:{_columns(value, operator, operand, problem.data['modulo'])}{result}"
        line, value = f"{value}{operator}{operand}={result}", result
        if not said:
            written.append(f"{number} {worked}")
            continue
        shown = said[number - 1] if number <= len(said) else "-"
        written.append(f"{number} {_shown(shown)},{worked}{_off(result, shown)} {'ok' if shown == line else 'no'}")
        if shown != line:
            return written, f"line {number}"
    if len(said) > len(steps):
        return [*written, f"{len(steps) + 1} {_shown(said[len(steps)])},- no"], f"line {len(steps) + 1}"
    answer = answer.strip(WHITESPACE)
    good = answer == str(value)
    return [*written, f"{value}{_off(value, answer)} {'ok' if good else 'no'}"], RIGHT if good else "answer"


def _shown(said: str) -> str:
    return said if said == "-" or READABLE.fullmatch(said) else "?"


def _off(result: int, said: str) -> str:
    """The result that a line or an answer says, and how far it is from the true one."""
    found = said.rpartition("=")[2] if READABLE.fullmatch(said) else ""
    return f",{found}:{abs(int(found) - result):02}" if found else ",?"


def _columns(value: int, operator: str, operand: int, modulo: int) -> str:
    """The step by columns, the last first, as in arithmetic: with what is carried or borrowed, which beyond the modulus is dropped. Nothing
    where the modulus is no power of ten."""
    written, carry = [], 0
    if modulo not in (10, 100, 1000):
        return ""
    for place, digit in enumerate(f"{value:0{len(str(modulo)) - 1}}"[::-1]):
        a, b = int(digit), 0 if place and operator != "*" else operand
        if operator == "-":
            borrowed = int(a < b + carry)
            written.append(f"{borrowed}{a}-{b}-{carry}={10 * borrowed + a - b - carry}")
            carry = borrowed
        else:
            found = a * b + carry if operator == "*" else a + b + carry
            written.append(f"{a}{operator}{b}+{carry}={found:02}")
            carry = found // 10
    return f"{','.join(written)}:"


def _result(problem: Problem) -> int:
    value: int = problem.data["start"]
    for operator, operand in problem.data["steps"]:
        value = _apply(value, operator, operand, problem.data["modulo"])
    return value


def _apply(value: int, operator: str, operand: int, modulo: int) -> int:
    if operator == "+":
        return (value + operand) % modulo
    return (value - operand if operator == "-" else value * operand) % modulo
