"""The verifier `code`: a Python program is right if it passes its tests, each run in the sandbox.

Where it can be, the comparison is the parent's: the expected values never enter the process that runs the answer, so that nothing the
answer does there can forge a pass.
"""

import ast
import importlib
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pascaline.errors import BadInput
from pascaline.post.verifiers import harness, sandbox
from pascaline.post.verifiers.base import Scores, answers, column
from pascaline.post.verifiers.sandbox import Limits, Ran

Run = Callable[[str, str, Limits], Ran]

BUDGET = 60.0  # seconds of its own for one answer's tests together
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
PLAIN = "b = __import__('builtins'); b.exit = b.quit = __import__('sys').exit; del b\nexec(compile({}, 'answer.py', 'exec'))\n"


@dataclass(frozen=True)
class Test:
    """One process: a program, its standard input, and whether what it printed is right."""

    source: str
    stdin: str
    passed: Callable[[str], bool]


def code(
    prompts: Sequence[Any], completions: Sequence[str], limits: Any = None, backend: Any = None, budget: Any = None, **columns: Any
) -> Scores:
    """1.0 if the answer's Python code passes all its tests, 0.0 if not, None if the sandbox or a loaded machine could not tell.

    Columns, one of: tests | inputs and outputs | entry_point and cases; see docs/verifiers.md. limits (a table of sandbox.Limits' fields),
    backend ("module:function" with sandbox.run's signature) and budget (seconds for all tests of an answer) are columns or single values.
    """
    column(columns, "code", "tests", "inputs", "cases")
    tables = [{key: values[i] for key, values in columns.items()} for i in range(len(completions))]
    each = zip(answers(completions), tables, *(_spread(one, len(completions)) for one in (limits, backend, budget)), strict=True)
    return sandbox.run_many(_judge, [(answer, _suite(table), _limits(a), _backend(b), _budget(c)) for answer, table, a, b, c in each])


def program(answer: str) -> str:
    """The last block fenced as Python; else the last fenced block without a language; else the whole answer."""
    blocks = FENCE.findall(answer)
    python = [text for language, text in blocks if language.lower() in ("python", "python3", "py")]
    plain = [text for language, text in blocks if not language]
    return [answer, *plain[-1:], *python[-1:]][-1]


def _judge(one: tuple[str | None, Callable[[str], Iterator[Test]], Limits, Run, float]) -> float | None:
    answer, suite, limits, run, budget = one
    if answer is None or not answer.strip():
        return 0.0
    seconds = 0.0
    for test in suite(program(answer)):
        ran = run(test.source, test.stdin, limits)
        if ran.ended in ("starved", "sandbox"):
            return None
        seconds += ran.seconds
        if ran.ended != "exit" or ran.status != 0 or seconds > budget or not test.passed(ran.stdout):
            return 0.0
    return 1.0


def _suite(table: dict[str, Any]) -> Callable[[str], Iterator[Test]]:
    """The tests of a problem, as a function of the code. The problem is read here, so that a mistake in it is told before anything runs."""
    if "cases" in table:
        return _values(*_cases(table.get("entry_point"), table["cases"]), same=_alike)
    if "inputs" in table:
        return _streams(table["inputs"], table.get("outputs"))
    return _values(*_asserts(table["tests"], table.get("entry_point")), same=_equal)


def _streams(inputs: Any, outputs: Any) -> Callable[[str], Iterator[Test]]:
    if not (_texts(inputs) and _texts(outputs) and inputs and len(inputs) == len(outputs)):
        raise BadInput("verifier 'code': inputs and outputs must be lists of texts of one length, at least one each.")

    def tests(source: str) -> Iterator[Test]:
        for stdin, expected in zip(inputs, outputs, strict=True):
            yield Test(PLAIN.format(ascii(source)), stdin, partial(_same_lines, expected))

    return tests


def _values(steps: list[list[Any]], expected: list[Any], same: Callable[[Any, Any], bool]) -> Callable[[str], Iterator[Test]]:
    """One process for all steps; it sends its values behind a nonce that it was given, and the parent compares."""
    text = _harness()

    def tests(source: str) -> Iterator[Test]:
        nonce = secrets.token_hex(16)

        def passed(said: str) -> bool:
            told, _, values = said.partition(" ")
            try:
                found = [harness.unpack(value) for value in json.loads(values)] if told == nonce else None
                return found is not None and len(found) == len(expected) and all(map(same, found, expected))
            except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):  # no honest program sends such values
                return False

        yield Test(text, json.dumps({"nonce": nonce, "code": source, "steps": steps}), passed)

    return tests


def _harness() -> str:
    with open(harness.__file__, encoding="utf-8") as file:
        return file.read()


def _cases(entry_point: Any, cases: Any) -> tuple[list[list[Any]], list[Any]]:
    right = isinstance(entry_point, str) and isinstance(cases, list) and cases
    if not right or not all(isinstance(case, list) and len(case) == 2 and isinstance(case[0], list) for case in cases):
        raise BadInput("verifier 'code': cases must be a list of [[arguments], expected], at least one, and entry_point a function's name.")
    return [["call", entry_point, case[0]] for case in cases], [case[1] for case in cases]


def _asserts(tests: Any, entry_point: Any) -> tuple[list[list[Any]], list[Any]]:
    """Steps and expected values of assert statements. Of `assert f(x) == LITERAL` the child evaluates f(x) and the parent compares;
    everything else (`assert f(x) > 2`, def check(candidate): ...) has to be executed beside the answer."""
    if not (isinstance(tests, str) or _texts(tests)):
        raise BadInput("verifier 'code': tests must be a text or a list of texts, assert statements.")
    text = tests if isinstance(tests, str) else "\n".join(tests)
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"verifier 'code': tests are no Python: {error}.") from error
    if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.Module(body, []))):
        raise BadInput("verifier 'code': tests have no assert statement; every answer would pass.")
    steps: list[list[Any]] = []
    expected: list[Any] = []
    for node in body:
        shape = _equation(node)
        steps.append(["run", ast.unparse(node)] if shape is None else ["value", shape[0]])
        expected += [] if shape is None else [shape[1]]
    if entry_point and any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in body):  # HumanEval's form
        steps.append(["run", f"check({entry_point})"])
    return steps, expected


def _equation(node: ast.stmt) -> tuple[str, Any] | None:
    """(source, value) of `assert source == value` with a literal on one side."""
    if not (isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and len(node.test.ops) == 1):
        return None
    if not isinstance(node.test.ops[0], ast.Eq):
        return None
    sides = node.test.left, node.test.comparators[0]
    for literal, other in (sides[::-1], sides):
        try:
            return ast.unparse(other), ast.literal_eval(literal)
        except (ValueError, TypeError):
            continue
    return None


def _equal(found: Any, expected: Any) -> bool:
    return bool(found == expected)


def _alike(found: Any, expected: Any) -> bool:
    """Equal as JSON: tuples are lists, floats agree to nine digits, true is not 1."""
    if isinstance(found, list | tuple) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_alike, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        named = {key if isinstance(key, str) else json.dumps(key): value for key, value in found.items()}
        return named.keys() == expected.keys() and all(_alike(named[key], expected[key]) for key in expected)
    if isinstance(found, bool) or isinstance(expected, bool) or not isinstance(found, int | float) or not isinstance(expected, int | float):
        return type(found) is type(expected) and bool(found == expected)
    if isinstance(found, int) and isinstance(expected, int):
        return found == expected
    return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)


def _same_lines(expected: str, said: str) -> bool:
    """Whatever white space stands around a line or around all of them."""
    first, second = ([line.strip() for line in text.strip().split("\n")] for text in (expected, said))
    return first == second


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _spread(value: Any, count: int) -> Sequence[Any]:
    return value if isinstance(value, list) else [value] * count


def _limits(table: Any) -> Limits:
    try:
        return Limits(**(table or {}))
    except TypeError as error:
        raise BadInput(f"verifier 'code': limits {table!r} are wrong: {error}.") from error


def _budget(seconds: Any) -> float:
    if seconds is None:
        return BUDGET
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise BadInput(f"verifier 'code': budget = {seconds!r} is wrong; it must be a number of seconds.")
    return seconds


def _backend(name: Any) -> Run:
    if not name:
        return sandbox.run
    module, _, function = str(name).partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's code: whatever it raises is told in one sentence
        raise BadInput(f"verifier 'code': backend '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise BadInput(f"verifier 'code': backend '{name}' is no function, but {type(found).__name__}.")
    return found
