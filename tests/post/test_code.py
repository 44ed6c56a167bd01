"""Programs judged by their tests: honest ones, their mutants, and those that would rather forge a pass."""

import json
from typing import Any

import pytest

from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.post.verifiers import get, judge
from pascaline.post.verifiers.code import program
from pascaline.post.verifiers.harness import pack, unpack
from pascaline.post.verifiers.sandbox import Limits, Ran

BUSY = {"cpu": 1, "wall": 60.0}  # a loaded machine may take its time
IDLE = {"wall": 1.0}


def code(*said: str, limits: Any = None, **table: Any) -> list[float | None]:
    """The scores of several answers to one problem."""
    columns = {name: [value] * len(said) for name, value in table.items()}
    return get("code")(prompts=[""] * len(said), completions=list(said), completion_ids=[[]] * len(said), limits=limits, **columns)


# (an honest solution, what a mutant has instead of what, its asserts)
TASKS = [
    ("def add(a, b):\n    return a + b", ("a + b", "a - b"), ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]),
    ("def evens(xs):\n    return [x for x in xs if x % 2 == 0]", ("== 0", "== 1"), ["assert evens([1, 2, 3, 4]) == [2, 4]"]),
    ("def ends(xs):\n    return xs[0], xs[-1]", ("-1", "1"), ["assert ends([1, 2, 3]) == (1, 3)", "assert ends('ab') == ('a', 'b')"]),
    ("def count(text):\n    return {c: text.count(c) for c in text}", ("count(c)", "find(c)"), ["assert count('aab') == {'a': 2, 'b': 1}"]),
    ("import math\ndef area(r):\n    return math.pi * r ** 2", ("** 2", "* 2"), ["assert abs(area(3) - 28.2743) < 0.001"]),
    ("def common(a, b):\n    return set(a) & set(b)", ("&", "|"), ["assert common([1, 2], [2, 3]) == {2}"]),
    (
        "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
        ("a, b = 0, 1", "a, b = 1, 1"),
        "assert fib(0) == 0\nassert fib(90) == 2880067194370816120\nfor n in range(2, 9):\n    assert fib(n) == fib(n - 1) + fib(n - 2)",
    ),
    ("def palindrome(s):\n    return s == s[::-1]", ("==", "!="), ["assert palindrome('aba')", "assert not palindrome('ab')"]),
    (
        "class Stack(list):\n    def push(self, x):\n        self.append(x)",
        ("append(x)", "insert(0, x)"),
        ["s = Stack()", "s.push(1)", "s.push(2)", "assert s.pop() == 2", "assert s == [1]"],
    ),
    (
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\ndef best(xs):\n    return max(map(P, xs)).x",
        ("max", "min"),
        ["assert best([3, 1, 2]) == 3, 'the largest'"],
    ),
]


@pytest.mark.parametrize(("solution", "mutation", "tests"), TASKS, ids=[task[0].split("(")[0][-8:] for task in TASKS])
def test_an_honest_solution_passes_and_its_mutant_fails(solution: str, mutation: tuple[str, str], tests: Any) -> None:
    mutant = solution.replace(*mutation)
    assert mutant != solution
    assert code(f"So:\n```python\n{solution}\n```\nDone.", mutant, tests=tests) == [1.0, 0.0]


SQUARE = {"entry_point": "square", "cases": [[[3], 9], [[-2], 4]]}
STREAM = {"inputs": ["3\n", "-2"], "outputs": ["9", "4\n"]}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("def square(x): return x * x", 1.0),
        ("print('loaded', flush=True)\ndef square(x):\n    print(x, flush=True)\n    return x * x", 1.0),  # what it prints is no result
        ("def square(x): return x + x", 0.0),
        ("def square(x): return 9", 0.0),  # right once
        ("def square(x): return str(x * x)", 0.0),
        ("def square(x): return float(x * x)", 1.0),
        ("def square(x): return object()", 0.0),
        ("def cube(x): return x ** 3", 0.0),
        ("def square(x): raise ValueError", 0.0),
        ("def square(x) return x", 0.0),
        ("", 0.0),
        ("```python\n```", 0.0),
        ("def square(x): return \0", 0.0),
        ("def square(x): return '\ud800'", 0.0),
    ],
)
def test_cases_are_called_and_compared(said: str, expected: float) -> None:
    assert code(said, **SQUARE) == [expected]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("print(int(input()) ** 2)", 1.0),
        ("import sys\nprint(' ', int(sys.stdin.read()) ** 2, '  \\n\\n')\nexit()", 1.0),
        ("if __name__ == '__main__':\n    print(int(input()) ** 2)", 1.0),
        ("from __future__ import annotations\nprint(int(input()) ** 2)", 1.0),
        ("print(abs(int(input())) * 3)", 0.0),
        ("print(int(input()) ** 2)\nexit(1)", 0.0),  # an error after all
        ("print(int(input()) ** 2)\nprint()\nprint(1)", 0.0),
        ("print(input(), input())", 0.0),
        ("print(int(input()) ** 2, end='')\nimport os, sys\nsys.stdout.flush()\nos._exit(0)", 1.0),
    ],
)
def test_a_program_is_compared_by_what_it_prints(said: str, expected: float) -> None:
    assert code(said, **STREAM) == [expected]


FORGERIES = {
    "exits": "import sys\nsys.exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "exits within": "import os\ndef square(x): os._exit(0)",
    "exits as an error": "import sys\nsys.excepthook = lambda *a: __import__('os')._exit(0)\ndef square(x): return 0",
    "exits at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef square(x): raise SystemExit(0)",
    "forks": "import os\nif os.fork(): os._exit(0)\ndef square(x): return 0",
    "equals everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def square(x): return Any()
""",
    "is a number that equals everything": """
class Any(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def square(x): return Any()
""",
    "prints results": """
import os
for fd in range(1, 10):
    try: os.write(fd, b"[9, 4]\\n9\\n")
    except OSError: pass
os._exit(0)
""",
    "prints a frame": "import os\nfor fd in (1, 3):\n    os.write(fd, b'0' * 32 + b' []\\n')\nos._exit(0)",
    "patches json": "import json\njson.dumps = lambda value: '[true, true]'\ndef square(x): return 0",
    "patches the builtins": """
import builtins
builtins.exec = builtins.eval = builtins.compile = lambda *a: None
builtins.AssertionError = ()
def square(x): return 0
""",
    "patches print": "import builtins\nold = print\nbuiltins.print = lambda *a: old(9)\ndef square(x): return 0",
    "reads the caller": """
import sys
def square(x): return max(map(str, sys._getframe(1).f_locals.values()), key=len)
""",
    "reads memory": """
import gc
found = [o for o in gc.get_objects() if isinstance(o, list) and o[-2:] == [9, 4]]
def square(x): return found[0][-2 if x == 3 else -1]
""",
    "reads the command line": """
text = "".join(open(f"/proc/{p}/cmdline").read() for p in (1, "self"))
def square(x): return int(text[text.index("cases") + 8:][0])
""",
}


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forger_fails(how: str) -> None:
    """In the shapes that the parent compares; and in asserts it has to execute, but for the __eq__ that the docs warn of."""
    answer = FORGERIES[how]
    assert code(answer, **SQUARE) == [0.0]
    assert code(answer, tests=["assert square(3) == 9", "assert 4 == square(-2)"]) == [0.0]
    if "Any" not in answer:
        assert code(answer, tests=["def check(f):\n    assert f(3) == 9", "check(square)"]) == [0.0]


@pytest.mark.parametrize("how", ["exits", "exits hard", "prints results", "patches print", "reads memory", "forks"])
def test_a_forger_of_output_fails(how: str) -> None:
    assert code(FORGERIES[how], **STREAM) == [0.0]


def test_expected_values_never_enter_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    seen.clear()
    secret = 918_273_645
    backend = f"{__name__}:spy"
    code("def f(): return 1", backend=backend, entry_point="f", cases=[[[], secret]])
    code("def f(): return 1", backend=backend, tests=[f"assert f() == {secret}", f"assert [{secret}] == f()"])
    code("print(1)", backend=backend, inputs=["in"], outputs=[str(secret)])
    assert len(seen) == 3 and not any(str(secret) in text for text in seen)
    code("def f(): return 1", backend=backend, tests=[f"assert f() < {secret}"])  # has to
    assert str(secret) in seen[-1]


seen: list[str] = []


def spy(source: str, stdin: str, limits: Limits) -> Ran:
    seen.append(source + stdin)
    return Ran(0, "", "", "exit", 0.0)


def dead(source: str, stdin: str, limits: Limits) -> Ran:
    return Ran(None, "", "no docker", "sandbox", 0.0)


def starved(source: str, stdin: str, limits: Limits) -> Ran:
    return Ran(None, "", "", "starved", 0.0)


def echoing(source: str, stdin: str, limits: Limits) -> Ran:
    """Right, and takes as many seconds as the CPU limit says."""
    return Ran(0, stdin, "", "exit", float(limits.cpu))


@pytest.mark.parametrize(
    ("said", "limits"),
    [
        ("while True: pass", BUSY),
        ("import time; time.sleep(60)", IDLE),  # nobody kept it from the processor
        ("x = bytearray(1 << 32)", BUSY),
        ("while True: print('9')", BUSY),
    ],
)
def test_a_limit_is_the_answers_own_fault(said: str, limits: dict[str, float]) -> None:
    assert code(said, limits=limits, **STREAM) == [0.0]


@pytest.mark.parametrize("backend", ["dead", "starved"])
def test_what_the_sandbox_could_not_run_is_not_judged(backend: str) -> None:
    problem = Problem("file", "square", "", {**STREAM, "backend": f"{__name__}:{backend}"}, "code")
    said = [Output([1], [0.0], "stop", "print(1)", None), Output([1], [0.0], "stop", "", "never closed")]
    judged = judge([problem], [said])
    assert judged.verdicts == [[Verdict.UNJUDGED, Verdict.WRONG]] and "code" in judged.trouble


def test_an_answers_tests_share_a_budget() -> None:
    table = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "3"], "backend": f"{__name__}:echoing"}
    assert code("x", limits={"cpu": 2}, budget=6.0, **table) == [1.0]
    assert code("x", limits={"cpu": 2}, budget=5.9, **table) == [0.0]


def test_scores_keep_the_order_of_answers() -> None:
    said = [f"import time\ntime.sleep({0.3 * (i % 2)})\nprint(int(input()) ** {1 + i % 3})" for i in range(6)]
    assert code(*said, **STREAM) == [0.0, 1.0, 0.0] * 2


def test_a_slow_answer_costs_the_others_nothing_of_their_verdict() -> None:
    right = "print(int(input()) ** 2)"
    assert code("import time; time.sleep(60)", right, "while True: pass", right, limits=[IDLE, BUSY, BUSY, BUSY], **STREAM) == [
        0.0,
        1.0,
        0.0,
        1.0,
    ]


def test_the_thought_is_no_program() -> None:
    right = "print(int(input()) ** 2)"
    assert code(f"<think>{right}</think>print(0)", f"<think>print(0)</think>{right}", f"<think>{right}", **STREAM) == [0.0, 1.0, 0.0]


def test_humaneval_is_read_as_it_is() -> None:
    tests = "def check(candidate):\n    assert candidate(3) == 9\n"
    assert code("def square(x): return x * x", "def square(x): return x", tests=tests, entry_point="square") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x = 1", "x = 1"),
        ("```python\na\n```\nthen\n```Python\nb\n```\n", "b\n"),
        ("```python\na\n```\nprints\n```\n3\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na", "a"),
        ("```python\ns = '''```'''\n```", "s = '''```'''\n"),
        ("Use `x`:\n```bash\nls\n```", "Use `x`:\n```bash\nls\n```"),
        ("```python title='a'\na\n```", "a\n"),
    ],
)
def test_the_last_python_block_is_the_program(answer: str, expected: str) -> None:
    assert program(answer) == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        -1.5,
        1 + 2j,
        "a",
        b"\x00",
        [1, (2, {3})],
        {(1, 2): [None]},
        frozenset({1}),
        float("inf"),
        10**300,
        {},
        {1: {"list": 2}},
    ],
)
def test_values_come_back_as_they_went(value: Any) -> None:
    found = unpack(json.loads(json.dumps(pack(value))))
    assert found == value and type(found) is (frozenset if isinstance(value, set) else type(value))


@pytest.mark.parametrize(
    "sent",
    ["[]", "nonsense", "9", "[[9]]", '[{"set": [{"list": []}]}, 4]', '[{"list": 3}, 4]', '[{"rm": []}, 4]', "[9, 4, 4]",
     "[" * 200_000, "[" + "9" * 9999 + ", 4]",
     "[NaN, 4]", '[{"complex": ["9", 0]}, 4]', '[{}, 4]', '[{"bytes": "9"}, 4]', '[{"dict": [9]}, 4]'],
)  # fmt: skip
def test_hostile_values_are_wrong_and_break_nothing(sent: str) -> None:
    """Even of a program that found the nonce."""
    thief = "import gc, os\nnonce = [o['nonce'] for o in gc.get_objects() if isinstance(o, dict) and 'nonce' in o][0]\n"
    send = f"sent = (nonce + ' ' + {sent!r}).encode()\nwhile sent: sent = sent[os.write(3, sent):]\nos._exit(0)"
    assert code(thief + send, **SQUARE) == [0.0]
    assert code(thief + send.replace(repr(sent), "'[9, 4]'"), **SQUARE) == [1.0]  # the same way, with the right values


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({}, "needs a column tests or inputs or cases"),
        ({"tests": []}, "no assert statement"),
        ({"tests": ["x = 1"]}, "no assert statement"),
        ({"tests": ["assert ("]}, "are no Python"),
        ({"tests": [3]}, "must be a text or a list of texts"),
        ({"cases": [[[1], 2]]}, "entry_point a function's name"),
        ({"cases": [[1, 2]], "entry_point": "f"}, "must be a list of"),
        ({"cases": [], "entry_point": "f"}, "at least one"),
        ({"inputs": ["1"]}, "lists of texts of one length"),
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "lists of texts of one length"),
        ({"inputs": [], "outputs": []}, "at least one each"),
        ({**STREAM, "backend": "nowhere:run"}, "backend 'nowhere:run' cannot be loaded"),
        ({**STREAM, "backend": f"{__name__}:BUSY"}, "is no function, but dict"),
        ({**STREAM, "budget": 0}, "budget = 0"),
        ({**STREAM, "budget": "long"}, "budget = 'long'"),
    ],
)
def test_a_problem_that_cannot_be_judged_is_refused(table: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        code("x", **table)


@pytest.mark.parametrize(("limits", "why"), [({"speed": 1}, "speed"), ({"cpu": -1}, "cpu = -1"), (3, "limits 3 are wrong")])
def test_wrong_limits_are_refused(limits: Any, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        code("x", limits=limits, **STREAM)
