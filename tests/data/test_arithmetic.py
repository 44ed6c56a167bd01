"""The arithmetic puzzle: its dials, its traces on paper, and what a constant answer scores."""

import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascaline.data import puzzles
from pascaline.data.puzzles import Trace, Verdict, arithmetic
from pascaline.errors import BadInput

DIALS = {"digits": [1, 9], "terms": [2, 6], "operators": [1, 3]}


def value(expression: str) -> int:
    """By Python's own arithmetic: of a text of digits, + - * and brackets only."""
    assert re.fullmatch(r"[-0-9+*()]+", expression)
    return int(eval(re.sub(r"\b0+(?=\d)", "", expression)))


@given(st.integers(0, 2**32))
def test_the_oracle_and_the_trace_agree_with_python(seed: int) -> None:
    rng = random.Random(seed)
    problem = arithmetic.generate(rng, **DIALS)
    right = str(value(problem.prompt.removesuffix("=")))
    assert arithmetic.solve(problem) == arithmetic.trace(problem, rng).answer == right
    for said, verdict in [(right, Verdict.RIGHT), (f" {right}\n", Verdict.RIGHT), ("none", Verdict.ABSTAIN)]:
        assert arithmetic.verify(problem, said) is verdict
    near = [str(int(right) + 1), f"+{right}", f"0{right}", f"-{right}", f"{right}.0", f"{right}.", problem.prompt, problem.prompt[:-1], ""]
    assert all(arithmetic.verify(problem, wrong) is Verdict.WRONG for wrong in near)


@given(st.integers(0, 2**32))
def test_every_line_of_a_trace_is_true(seed: int) -> None:
    rng = random.Random(seed)
    problem = arithmetic.generate(rng, **DIALS)
    below = ""
    for line in arithmetic.trace(problem, rng).thought.split("\n"):
        forms, comma, stack = line.partition(",")
        assert len({value(form) for form in forms.split("=")}) == 1, line
        if comma:  # a column: one digit more stands below
            assert all(len(number) <= 2 for number in re.findall(r"\d+", forms))
            assert stack[1:] in ("", below) and stack[0] == forms[-1]
            below = stack


@pytest.mark.parametrize(
    ("numbers", "operators", "thought"),
    [
        ([47, 85], "+", "47+85|7+5+0=12,2|4+8+1=13,32|47+85=132"),
        ([5, 105], "+", "5+105|5+5+0=10,0|0+0+1=01,10|0+1+0=01,110|5+105=110"),
        ([100, 99], "-", "100-99|10-9-0=1,1|10-9-1=0,01|01-0-1=0,001|100-99=1"),
        ([17, 52], "-", "17-52=-(52-17)|12-7-0=5,5|05-1-1=3,35|17-52=-35"),
        ([3, 9, 4], "--", "3-9-4|3-9=-(9-3)|09-3-0=6,6|3-9=-6|-6-4=-(6+4)|6+4+0=10,0|-6-4=-10"),
        ([3, 9, 20], "-+", "3-9+20|3-9=-(9-3)|09-3-0=6,6|3-9=-6|-6+20=20-6|10-6-0=4,4|02-0-1=1,14|-6+20=14"),
        ([7, 34, 6], "-*", "7-34*6|34*6|4*6+0=24,4|3*6+2=20,04|34*6=204|7-204=-(204-7)|14-7-0=7,7|10-0-1=9,97|02-0-1=1,197|7-204=-197"),
        (
            [34, 26],
            "*",
            "34*26=34*6+34*20|4*6+0=24,4|3*6+2=20,04|34*6=204|4*2+0=08,8|3*2+0=06,68|34*20=680"
            "|204+680|4+0+0=04,4|0+8+0=08,84|2+6+0=08,884|204+680=884|34*26=884",
        ),
    ],
)
def test_traces_are_written_as_on_paper(numbers: list[int], operators: str, thought: str) -> None:
    problem = arithmetic.write(numbers, operators)
    assert arithmetic.trace(problem, random.Random(0)) == Trace(thought.replace("|", "\n"), thought.rsplit("=", 1)[1])


def test_slips_are_as_frequent_as_said_and_the_rest_follows_from_them() -> None:
    rng = random.Random(0)
    drawn = puzzles.problems("arithmetic", 2000, 1, False)

    def right(slip: float) -> float:
        traces = [arithmetic.trace(problem, rng, slip=slip) for problem in drawn]
        assert all(trace.thought.endswith(f"={trace.answer}") for trace in traces)
        return sum(arithmetic.verify(p, t.answer) is Verdict.RIGHT for p, t in zip(drawn, traces, strict=True)) / len(drawn)

    assert right(0.0) == 1.0 and right(1.0) == 0.0
    assert abs(right(0.1) - 0.9**2) < 0.04  # nearly all have two columns
    with pytest.raises(BadInput, match="slip=2 must be a share"):
        arithmetic.trace(drawn[0], rng, slip=2)


def test_dials_set_digits_terms_and_operators() -> None:
    for operators in (1, 2, 3):
        for problem in puzzles.problems("arithmetic", 300, 0, False, digits=3, terms=[2, 4], operators=operators):
            assert set(problem.data["operators"]) <= set("+-*"[:operators])
            assert 2 <= len(problem.data["numbers"]) <= 4 and all(1 <= number <= 999 for number in problem.data["numbers"])
            assert re.fullmatch(r"\d+([-+*]\d+)+=", problem.prompt)
    with pytest.raises(BadInput, match="operators=4 must be a whole number from 1 to 3"):
        puzzles.problems("arithmetic", 1, 0, False, operators=4)


def test_one_sum_in_another_order_is_the_same_problem() -> None:
    def key(numbers: list[int], operators: str) -> str:
        return arithmetic.write(numbers, operators).key

    assert key([12, 7], "+") == key([7, 12], "+") == "arithmetic +12+7"
    assert key([3, 4, 5], "*-") == key([4, 3, 5], "*-") != key([5, 3, 4], "-*")
    assert key([9, 3, 4, 5], "+*-") == key([4, 3, 5, 9], "*-+")
    assert key([12, 7], "-") != key([7, 12], "-") and key([1, 23], "+") != key([12, 3], "+")


@pytest.mark.parametrize(("dials", "most"), [({}, 0.02), ({"operators": 3}, 0.02), ({"terms": 3}, 0.02), ({"digits": 1}, 0.12)])
def test_a_constant_answer_and_an_echo_score_little(dials: dict[str, Any], most: float) -> None:
    drawn = puzzles.problems("arithmetic", 4000, 0, False, **dials)
    [(_, times)] = Counter(arithmetic.solve(problem) for problem in drawn).most_common(1)
    assert times / len(drawn) < most
    assert not any(arithmetic.verify(p, said) is Verdict.RIGHT for p in drawn for said in (p.prompt, p.prompt[:-1]))
