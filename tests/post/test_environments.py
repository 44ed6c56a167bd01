"""Environments: what tools answer, what they refuse, and that nothing a model writes can break or hold them up."""

import sys
import time
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from pascaline import plugins
from pascaline.data.puzzles import Problem
from pascaline.errors import BadInput
from pascaline.post import environments
from pascaline.post.check import check
from pascaline.post.environments.base import LONGEST, Observation, Refused, argument
from pascaline.post.environments.calculator import Calculator
from pascaline.post.environments.python import Python
from pascaline.post.verifiers import sandbox
from pascaline.post.verifiers.sandbox import Limits, Ran

PROBLEM = Problem("arithmetic", "12*7=", "arithmetic +12*7", {"numbers": [12, 7], "operators": "*"})


def told(tool: environments.Tool, asked: str) -> str:
    """What stands between the result's tags."""
    seen = tool.step(f"<tool>{asked}</tool>")
    assert not seen.done and seen.text.startswith("<result>") and seen.text.endswith("</result>")
    return seen.text[len("<result>") : -len("</result>")]


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, asked",
    [
        ("84", None),
        ("", None),
        ("the result> is <84>", None),
        ("<tool>12*7</tool>", "12*7"),
        ("First <tool> 1 + 1 </tool>", " 1 + 1 "),
        ("<tool>1</tool>.", "1"),  # the rest of a token that the tag ended in
        ("<tool></tool>", ""),
        ("<tool>a<b</tool>", "a<b"),
    ],
)
def test_a_call_is_found_at_the_end_of_what_was_said(said: str, asked: str | None) -> None:
    assert argument(said) == asked


@pytest.mark.parametrize("said", ["<tool>1", "1</tool>", "<tool>1<tool>2</tool>", "</tool>", "<tool>", "</tool><tool>1"])
def test_a_malformed_call_is_answered_with_how_to_write_one(said: str) -> None:
    with pytest.raises(Refused):
        argument(said)
    seen = Calculator().step(said)
    assert seen == Observation("<result>error: a call is written <tool>...</tool>, one at a time</result>")


def test_a_turn_without_a_call_is_the_answer() -> None:
    assert Calculator().step("84") == Observation(done=True)


# ---- the calculator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, found",
    [("12*7", "84"), (" 1/3 + 1/6 ", "1/2"), ("3-5", "-2"), ("(1+2)*3", "9"), ("6/3", "2"), ("999999999*999999999", "999999998000000001")],
)
def test_the_calculator_is_exact(asked: str, found: str) -> None:
    assert told(Calculator(), asked) == found


@pytest.mark.parametrize(
    "asked", ["", "x", "1/0", "2**9", "-3", "1+1=", "1_0", "__import__('os')", "9" * 10, "(" * 400, "1\n+1", "٣+١", "1e9"]
)
def test_what_is_no_arithmetic_is_refused(asked: str) -> None:
    assert told(Calculator(), asked).startswith("error: write whole numbers")


def test_the_prompt_says_how_to_call() -> None:
    assert Calculator().reset(PROBLEM).endswith("\n12*7=") and "<tool>12*7</tool>" in Calculator().reset(PROBLEM)


# ---- Python ----------------------------------------------------------------------------------------------------------


def test_python_gives_what_is_printed() -> None:
    assert told(Python(), "print(12*7)") == "84"
    assert told(Python(), "\nfor i in range(2):\n    print(i)\n") == "0\n1"
    assert told(Python(), "```python\nprint(5)\n```") == "5"
    assert told(Python(), "1 + 1") == "error: nothing was printed"


def test_python_tells_what_went_wrong_behind_what_was_printed() -> None:
    assert told(Python(), "print(1)\nprint(1/0)") == "1\nerror: ZeroDivisionError: division by zero"
    assert told(Python(), "x = (") == "error: SyntaxError: '(' was never closed"
    assert told(Python(), "import sys; sys.exit(3)") == "error: the program ended with status 3"
    assert told(Python(), "import os; os.kill(os.getpid(), 9)") == "error: the program was killed by signal 9"


def test_a_program_that_hangs_is_killed_and_says_so() -> None:
    began = time.monotonic()
    assert told(Python(Limits(wall=0.5)), "import time\nprint('x', flush=True)\ntime.sleep(600)") == "x\nerror: stopped after 0.5 seconds"
    assert told(Python(Limits(cpu=1)), "while True: pass") == "error: stopped after 1 seconds of computing"
    assert time.monotonic() - began < 300


def test_output_is_capped() -> None:
    found = told(Python(), f"print('ab' * {LONGEST})")
    assert found == "ab" * (LONGEST // 2) + f"... ({LONGEST} characters more)"
    endless = told(Python(Limits(output=5000)), "while True: print('abcd')")
    assert endless.startswith("abcd\nabcd\n") and len(endless) < LONGEST + 50


def test_each_call_is_a_program_of_its_own() -> None:
    tool = Python()
    assert told(tool, "x = 1; print(x)") == "1"
    assert told(tool, "print(x)") == "error: NameError: name 'x' is not defined"


@pytest.mark.parametrize("ended", ["starved", "sandbox"])
def test_a_machine_that_cannot_run_programs_is_not_the_models_mistake(monkeypatch: pytest.MonkeyPatch, ended: Any) -> None:
    monkeypatch.setattr(sandbox, "run", lambda *_: Ran(None, "", "no room", ended, 0.0))
    with pytest.raises(RuntimeError, match="could not run a program: no room"):
        Python().step("<tool>print(1)</tool>")


# ---- names -----------------------------------------------------------------------------------------------------------


class Silent:
    def reset(self, problem: Problem) -> str:
        return problem.prompt

    def step(self, said: str) -> Observation:
        return Observation(done=True)


class Deaf:
    def reset(self, problem: Problem) -> str:
        return ""


def broken() -> None:
    raise ValueError("no luck")


thing = Silent()


def test_an_environment_is_found_by_name_or_path() -> None:
    assert environments.get("calculator") is Calculator and environments.get("python") is Python
    made = environments.get(f"{__name__}:Silent")
    assert type(made()) is Silent and made() is not made()


def test_an_installed_plugin_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("quiet", f"{__name__}:Silent", "pascaline.environments")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "pascaline.environments" else [])
    assert environments.get("quiet") is sys.modules[__name__].Silent


@pytest.mark.parametrize(
    "name, why",
    [
        ("calculater", "no environment 'calculater'.*calculator.*module:function"),
        (f"{__name__}:Deaf", "lacks step"),
        (f"{__name__}:thing", "lacks reset and step"),
        (f"{__name__}:broken", "ValueError: no luck"),
        (f"{__name__}:nothing", "AttributeError"),
        ("nowhere_at_all:x", "ModuleNotFoundError"),
    ],
)
def test_what_is_no_environment_is_named(name: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        environments.get(name)


def test_a_recipe_with_an_unknown_environment_is_refused_before_it_starts() -> None:
    from test_check import recipe

    check(recipe(rl__environment="calculator"))
    with pytest.raises(BadInput, match="no environment 'calc'"):
        check(recipe(rl__environment="calc"))
