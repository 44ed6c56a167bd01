"""Chained arithmetic: start with a number, add, subtract, multiply, keep two digits.

Generator, trace writer, oracle and verifier in one file. Every intermediate is reduced modulo 100, so that each step
is a fact about two-digit numbers and a slip anywhere spoils the result.
"""

from __future__ import annotations

import random
from typing import Any

from pascaline.data.puzzles.base import WHITESPACE, Dial, Problem, Trace, Verdict, share, turn
from pascaline.data.puzzles.calls import call

LEVELS = {"steps": Dial(4, 2, 5), "modulo": Dial(100, 10, 1000)}
WORDS = {"+": "add", "-": "subtract", "*": "multiply by"}


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


def _result(problem: Problem) -> int:
    value: int = problem.data["start"]
    for operator, operand in problem.data["steps"]:
        value = _apply(value, operator, operand, problem.data["modulo"])
    return value


def _apply(value: int, operator: str, operand: int, modulo: int) -> int:
    if operator == "+":
        return (value + operand) % modulo
    return (value - operand if operator == "-" else value * operand) % modulo
