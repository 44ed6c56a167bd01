"""Problems from a file of theirs: one JSON object a line, as GSM8K and TRL's data sets have them.

The first of the columns PROMPTS is the problem; all others go to the verifier that judges the answers.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pascaline.data.puzzles.base import Problem, Trace
from pascaline.errors import BadInput

PROMPTS = ("prompt", "question", "problem")
GOLD = ("answer", "solution", "ground_truth", "label")
THOUGHTS = ("reasoning", "thinking", "reasoning_content", "thought")
TAKEN = ("prompts", "completions", "completion_ids")  # a verifier's own arguments
MARK = "####"  # in GSM8K, between the worked solution and the answer
CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator


@lru_cache(maxsize=16)
def read(path: str, name: str, verifier: str, columns: str = "{}") -> tuple[Problem, ...]:
    """The problems of a .jsonl file in its order, the first of those that are equal up to case and spaces.

    columns: a JSON object of columns that each problem has too. BadInput with the line for what is no problem.
    """
    found: dict[str, Problem] = {}
    constant = json.loads(columns)
    for where, row in rows(path):
        problem = _problem(row, where, name, verifier, constant)
        found.setdefault(problem.key, problem)
    if not found:
        raise BadInput(f"puzzle '{name}': {path} holds no problem.")
    return tuple(found.values())


def rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) of each line of a .jsonl file. BadInput for what is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", _row(line, f"{path} line {number}")
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}.") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise BadInput(f"{path} is no text file; it must have one JSON object a line.") from None


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where} is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where} is no JSON object, but {type(row).__name__}.")
    return row


def drawn(problems: Iterable[Problem], count: int, seed: int, again: bool) -> list[Problem]:
    """`count` of them in a seeded order; a longer list begins like a shorter one. again: when all have been drawn, draw them again in
    another order, else the list ends there."""
    pool, found = list(problems), list[Problem]()
    while pool and len(found) < count and (again or not found):
        turn = pool[:]
        random.Random(f"{seed} {len(found) // len(pool)}").shuffle(turn)
        found += turn[: count - len(found)]
    return found


def trace(problem: Problem) -> Trace:
    """The worked solution that the file gives, as thought and answer: GSM8K's, or a column of THOUGHTS with one of GOLD, or the gold
    answer behind an empty thought. BadInput for a problem without an answer."""
    gold = next((str(problem.data[key]) for key in GOLD if problem.data.get(key) is not None), None)
    if gold is None:
        raise BadInput(
            f"puzzle '{problem.puzzle}' has no solutions to learn from (none of the columns {', '.join(GOLD)}): {problem.prompt!r}."
        )
    thought = next((str(problem.data[key]) for key in THOUGHTS if problem.data.get(key) is not None), "")
    worked, marked, answer = gold.rpartition(MARK)
    if marked:
        thought, gold = thought or CALCULATION.sub("", worked), answer
    return Trace(thought.strip(), gold.strip())


def _problem(row: dict[str, Any], where: str, name: str, verifier: str, columns: Mapping[str, Any]) -> Problem:
    column = next((key for key in PROMPTS if key in row), None)
    if column is None:
        raise BadInput(f"{where} has no problem: it needs one of the columns {', '.join(PROMPTS)}, and has {', '.join(row) or 'none'}.")
    prompt = row.pop(column)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict) and prompt[0].get("role") == "user":
        prompt = prompt[0].get("content")  # a conversation of one message
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInput(f"{where}: {column} must be a text, or a conversation of one user message.")
    if taken := [key for key in (*row, *columns) if key in TAKEN]:
        raise BadInput(f"{where}: a column may not be called {taken[0]}, which is an argument of every verifier.")
    return Problem(name, prompt, _key(prompt), {**row, **columns}, verifier)


def _key(prompt: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
