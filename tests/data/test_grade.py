"""Grading: the grade is what another way of checking finds, the review ends in it, and nothing else is right."""

import json
import random
import re
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_puzzles import reference

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Trace, Verdict, chain, countdown, grade
from pascaline.data.puzzles.expression import evaluate, rewritten
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.eval import suite
from pascaline.eval.plan import Plan
from pascaline.post import verifiers

DIALS = [
    ("chain", {}),
    ("chain", {"steps": [2, 5], "modulo": [10, 1000]}),
    ("chain", {"modulo": 1000}),
    ("countdown", {}),
    ("countdown", {"numbers": 4}),
]
MANY = 1500
LINE = re.compile(r"(0|[1-9][0-9]*)([-+*])([0-9])=(0|[1-9][0-9]*)")
FAULTS = {"chain": r"line [1-6]|answer", "countdown": r"numbers|none|unreadable|makes -?[0-9]+(/[0-9]+)?"}


@lru_cache
def attempts(name: str, dials: str) -> list[Problem]:
    return puzzles.problems(f"grade:{name}", MANY, 3, False, **json.loads(dials))


def drawn(name: str, count: int, dials: dict[str, Any]) -> list[Problem]:
    """Of the training side. A longer list begins like a shorter."""
    return attempts(name, json.dumps(dials))[:count]


def parts(problem: Problem) -> tuple[Problem, str, str]:
    return Problem(**problem.data["problem"]), problem.data["thought"], problem.data["answer"]


def chain_grade(problem: Problem, thought: str, answer: str) -> str:
    """By what each line says against the line before it, never by the right ones; the right answer in one sum, reduced at its end."""
    data = problem.data
    total = data["start"]
    for operator, operand in data["steps"]:
        total = {"+": total + operand, "-": total - operand, "*": total * operand}[operator]
    if thought:
        before, lines = str(data["start"]), thought.split("\n")
        for number, line in enumerate(lines, 1):
            read = LINE.fullmatch(line)
            if number > len(data["steps"]) or not read or read[1] != before or [read[2], int(read[3])] != data["steps"][number - 1]:
                return f"line {number}"
            off = {"+": int(read[1]) + int(read[3]), "-": int(read[1]) - int(read[3]), "*": int(read[1]) * int(read[3])}[read[2]]
            if (off - int(read[4])) % data["modulo"] or int(read[4]) >= data["modulo"]:
                return f"line {number}"
            before = read[4]
        if len(lines) < len(data["steps"]):
            return f"line {len(lines) + 1}"
    return "right" if answer == str(total % data["modulo"]) else "answer"


def countdown_grade(problem: Problem, thought: str, answer: str) -> str:
    if answer == "none":
        return "none"
    read = reference(answer)
    if read is None or any(number >= 10**9 for number in read[1]):  # no number has more than nine digits
        return "unreadable"
    if Counter(read[1]) != Counter(problem.data["numbers"]):
        return "numbers"
    return "right" if read[0] == problem.data["target"] else f"makes {read[0]}"


ORACLES = {"chain": chain_grade, "countdown": countdown_grade}


@pytest.mark.parametrize("name, dials", DIALS)
def test_grades_are_what_another_way_of_checking_finds(name: str, dials: dict[str, Any]) -> None:
    puzzle = puzzles.get(f"grade:{name}")
    for problem in drawn(name, MANY, dials):
        inner, thought, answer = parts(problem)
        found = ORACLES[name](inner, thought, answer)
        assert puzzle.solve(problem) == found and re.fullmatch(FAULTS[name] + "|right", found)
        right = puzzles.get(name).verify(inner, answer) is Verdict.RIGHT
        assert right or found != "right"
        assert right == (found == "right") or thought, "only a thought can be wrong beside a right answer"


@pytest.mark.parametrize("name, dials", DIALS)
def test_about_half_of_the_attempts_are_right_and_every_fault_occurs(name: str, dials: dict[str, Any]) -> None:
    grades = Counter(puzzles.get(f"grade:{name}").solve(p) for p in drawn(name, MANY, dials))
    assert 0.44 < grades["right"] / grades.total() < 0.56
    steps = dials.get("steps", [4, 4])
    wanted = ["answer", *(f"line {i + 1}" for i in range(steps[-1] + 1))] if name == "chain" else ["numbers", "none", "unreadable"]
    assert all(grades[fault] for fault in wanted)
    assert name == "chain" or sum(n for fault, n in grades.items() if fault.startswith("makes")) > 300


def sound(problem: Problem) -> list[str]:
    return chain.trace(problem, random.Random(0), slip=0.0, direct=0.0).thought.split("\n")


def faults(lines: list[str], at: int) -> list[list[str]]:
    """The lines with one of them gone wrong, in many ways."""
    begin, result = lines[at].split("=")
    other = re.sub(r"[-+*]", lambda m: {"+": "-", "-": "*", "*": "+"}[m[0]], begin)
    changed = [f"{begin}={(int(result) + 1) % 100}", f"{begin}={int(result) + 100}", f"{other}={result}", f"{begin}1={result}",
               f"1{begin}={result}", f" {begin}={result}", f"{begin}=0{result}", f"{begin}={result} ", f"{begin} = {result}", "", "so",
               f"{begin}={result}\r", f"{begin}={result}=", f"{begin}=٣"]  # fmt: skip
    return [[*lines[:at], line, *lines[at + 1 :]] for line in changed]


@given(st.integers(0, 2**32), st.integers(0, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_line_that_is_wrong_is_the_line_that_is_named(seed: int, at: int, held_out: bool) -> None:
    problem = puzzles.problems("chain", 1, seed, held_out)[0]
    lines, answer = sound(problem), str(chain.solve(problem))
    assert chain.check(problem, "\n".join(lines), f" {answer}\n") == "right"
    for wrong in faults(lines, at):
        if "\n".join(wrong).strip() != "\n".join(lines):  # blanks around it all are none of a line
            assert chain.check(problem, "\n".join(wrong), answer) == f"line {at + 1}", wrong
    superfluous = [*lines, lines[-1]]
    assert chain.check(problem, "\n".join(superfluous), answer) == "line 5"
    assert chain.check(problem, "\n".join(lines[:at] + lines[at + 1 :]), answer) == f"line {at + 1}"
    assert chain.check(problem, "\n".join(lines), f"{answer}1") == chain.check(problem, "", f"{answer}1") == "answer"
    assert chain.check(problem, "", answer) == "right"


def test_a_right_answer_by_a_wrong_path_is_a_fault() -> None:
    problem = Problem("chain", "", "", {"start": 50, "steps": [["*", 4], ["+", 2]], "modulo": 100})
    assert chain.check(problem, "50*4=0\n0+2=2", "2") == "right"
    assert chain.check(problem, "50*2=0\n0+2=2", "2") == "line 1"
    assert chain.check(problem, "50*4=10\n0+2=2", "2") == "line 1"


@pytest.mark.parametrize(
    "answer, found, ending",
    [
        ("(13-1)*2", "right", "13 of 1 2 13, 1 of 1 2, 2 of 2 ok\n(13-1)*2=12*02=24,24:00 yes"),
        (" 13*2 - 1*2", "numbers", "13 of 1 2 13, 2 of 1 2, 1 of 1, 2 of - no"),
        ("13*2 -1 ", "makes 25", "13*2-1:13 of 1 2 13, 2 of 1 2, 1 of 1 ok\n13*2-1=26-01=25,24:01 no"),
        ("2-13-1", "makes -12", "2-13-1=(-11)-01=-12,24:36 no"),
        ("13/2+((1))", "makes 15/2", "13/2+((1))=(13/2)+01=15/2,24:33/2 no"),
        ("13*2", "numbers", "13 of 1 2 13, 2 of 1 2, left 1 no"),
        ("12*2*1", "numbers", "12 of 1 2 13 no"),
        ("(13-1*2", "unreadable", "no value"),
        ("13/(1-1)", "unreadable", "no value"),
        ("none", "none", ""),
        ("", "unreadable", "no value"),
    ],
)
def test_a_countdown_claim_is_worked_out(answer: str, found: str, ending: str) -> None:
    problem = Problem("countdown", "", "", {"numbers": [1, 2, 13], "target": 24})
    assert countdown.check(problem, "whatever", answer) == found
    assert countdown.review(problem, "whatever", answer).endswith(ending)


expressions = st.recursive(
    st.integers(0, 30).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.booleans()).map(
        lambda t: f"({t[0]}{t[1]}{t[2]})" if t[3] else f"{t[0]} {t[1]} {t[2]}"
    ),
    max_leaves=6,
)


@given(expressions)
@settings(max_examples=500, deadline=None)
def test_every_rewriting_has_the_value_of_the_whole(text: str) -> None:
    read = evaluate(text)
    if read is None:
        return
    forms = rewritten(text)
    assert forms[0] == text.replace(" ", "") and len(forms) == max(len(read[1]), 1)
    for form in forms[1:]:
        told = reference(re.sub(r"(?<![0-9])0+(?=[0-9])", "", form.replace("(-", "(0-").removeprefix("-")))
        assert told is not None and (-told[0] if form.startswith("-") else told[0]) == read[0], forms


@pytest.mark.parametrize("name, dials", DIALS)
def test_a_review_ends_in_the_grade_and_says_nothing_false(name: str, dials: dict[str, Any]) -> None:
    puzzle = puzzles.get(f"grade:{name}")
    for problem in drawn(name, 400, dials):
        inner = parts(problem)[0]
        trace = puzzle.trace(problem, random.Random(0))
        assert puzzle.verify(problem, trace.answer) is Verdict.RIGHT
        *before, last = trace.thought.split("\n")
        if name == "chain":
            assert last.endswith("ok" if trace.answer == "right" else "no") and not any(line.endswith("no") for line in before)
            fault = trace.answer.removeprefix("line ")
            assert not fault.isdecimal() or last.startswith(f"{fault} ")
            worked = re.findall(r"^[1-5] (?:\S+,)?([0-9]+[-+*][0-9]):(?:([^:\n]*):)?([0-9]+)(?:,|$)", trace.thought, re.MULTILINE)
            assert all(f"{step}={result}" in sound(inner) for step, _, result in worked)
            assert len(worked) == (min(int(fault), len(sound(inner))) if fault.isdecimal() else len(sound(inner)))
            for _, columns, result in worked:
                done = [re.fullmatch(r"([0-9]+)([-+*])([0-9])([-+])([0-9])=([0-9]+)", column) for column in columns.split(",") if column]
                assert all(
                    c and reference(f"{int(c[1])}{c[2]}{c[3]}{c[4]}{c[5]}") == (int(c[6]), [int(c[i]) for i in (1, 3, 5)]) for c in done
                )
                assert not done or int("".join(c[6][-1] for c in reversed(done) if c)) == int(result)
            assert bool(worked[0][1]) == (inner.data["modulo"] in (10, 100, 1000))
        elif trace.answer.startswith("makes"):
            value, target, off = re.findall(r"=(-?[0-9/]+),([0-9]+):([0-9/]+) no$", last)[0]
            assert Fraction(value) == Fraction(trace.answer.split()[1]) and abs(Fraction(value) - int(target)) == Fraction(off)
        elif trace.answer in ("right", "numbers"):
            assert last.endswith(" yes" if trace.answer == "right" else " no")


def test_a_countdown_review_is_written_as_a_trace_is() -> None:
    for problem in puzzles.problems("countdown", 100, 1, held_out=False):
        trace = countdown.trace(problem, random.Random(0), attempts=1, planted=1.0)
        if trace.answer != "none":
            assert countdown.review(problem, "", trace.answer).endswith("\n" + trace.thought)


@given(st.sampled_from(["chain", "countdown"]), st.text(max_size=80), st.text(max_size=80), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_text_can_be_graded(name: str, thought: str, answer: str, tidy: bool) -> None:
    problem = puzzles.problems(name, 1, 1, held_out=False)[0]
    thought = "\n".join(sound(problem)) + thought if tidy and name == "chain" else thought
    asked = grade.ask(problem, thought, answer)
    own = puzzles.get(asked.puzzle)
    assert own.verify(asked, own.trace(asked, random.Random(0)).answer) is Verdict.RIGHT
    assert own.solve(asked) == ORACLES[name](problem, asked.data["thought"], asked.data["answer"])
    assert len(own.trace(asked, random.Random(0)).thought) < 400


@pytest.mark.parametrize("name", ["chain", "countdown"])
def test_a_grader_never_meets_a_problem_of_the_other_side(name: str) -> None:
    inner = {p.key for p in puzzles.problems(name, 300, 0, held_out=True)}
    held, trained = puzzles.problems(f"grade:{name}", 300, 3, held_out=True), drawn(name, MANY, {})
    assert all(puzzles.held_out(p.key) and p.key == p.data["problem"]["key"] for p in held)
    assert not any(puzzles.held_out(p.key) for p in trained) and not {p.key for p in trained} & ({p.key for p in held} | inner)
    assert len({p.key for p in held}) == 300


@pytest.mark.parametrize("name, dials", DIALS)
def test_the_prompt_is_one_form_and_short(name: str, dials: dict[str, Any]) -> None:
    line = r"([0-9]+[-+*][0-9]=[0-9]+\n)*" if name == "chain" else ""
    form = re.compile(rf"Grade this\.\n[^\n]+\n{line}Answer: [^\n]+")
    for problem in drawn(name, 300, dials):
        inner, thought, answer = parts(problem)
        assert form.fullmatch(problem.prompt) and len(problem.prompt) < 200
        assert grade.ask(inner, thought, answer) == problem and f"\n{inner.prompt}\n" in problem.prompt


def test_countdown_shows_the_answer_alone() -> None:
    problem = puzzles.problems("countdown", 1, 1, held_out=False)[0]
    assert grade.ask(problem, "a long search", "1+2") == grade.ask(problem, "", " 1+2\n")
    assert "search" not in json.dumps(asdict(grade.ask(problem, "a long search", "1+2")))


@pytest.mark.parametrize("name, dials", DIALS)
def test_problems_survive_json(name: str, dials: dict[str, Any]) -> None:
    for problem in drawn(name, 50, dials):
        back = Problem(**json.loads(json.dumps(asdict(problem))))
        assert back == problem and puzzles.get(back.puzzle).solve(back) == puzzles.get(problem.puzzle).solve(problem)


def test_a_true_verdict_with_a_false_fault_earns_nothing() -> None:
    problem = Problem("chain", "Start with 1, add 2, add 3, add 4. Result modulo 100?", "k",
                      {"start": 1, "steps": [["+", 2], ["+", 3], ["+", 4]], "modulo": 100})  # fmt: skip
    asked = grade.ask(problem, "1+2=3\n3+3=7\n7+4=11", "11")
    said = ["line 2", "line 1", "line 3", "answer", "wrong", "line", "right", "line 2.", "line 2\n", "Line 2", "none", ""]
    judged = verifiers.judge([asked], [[Output([], [], "stop", text, "1 1+2=3,1+2:1+2+0=03,0+0+0=00:3,3:00 ok") for text in said]])
    assert [text for text, verdict in zip(said, judged.verdicts[0], strict=True) if verdict is Verdict.RIGHT] == ["line 2", "line 2\n"]
    assert set(judged.verdicts[0]) == {Verdict.RIGHT, Verdict.WRONG}, "a grade never abstains"


def test_a_slip_is_the_review_of_another_attempt() -> None:
    for name in ("chain", "countdown"):
        puzzle, problems = puzzles.get(f"grade:{name}"), drawn(name, 300, {})
        traces = [puzzle.trace(p, random.Random(i), slip=1.0) for i, p in enumerate(problems)]
        right = [puzzle.verify(p, t.answer) is Verdict.RIGHT for p, t in zip(problems, traces, strict=True)]
        assert 0.2 < sum(right) / len(right) < 0.6  # by chance: both are often right
        assert all(t.thought.endswith(("ok", "yes")) for t in traces if t.answer == "right")
    with pytest.raises(BadInput, match="slip=2 must be a share"):
        puzzle.trace(problems[0], random.Random(0), slip=2)


def test_what_cannot_be_graded_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="puzzle 'grade:arithmetic': attempts at 'arithmetic' cannot be graded, it lacks attempt, check"):
        puzzles.get("grade:arithmetic")
    with pytest.raises(BadInput, match="no puzzle 'chian'; did you mean 'chain'"):
        puzzles.get("grade:chian")
    with pytest.raises(BadInput, match="cannot be graded"):
        grade.ask(Problem("arithmetic", "1+1=", "k", {}), "", "2")
    with pytest.raises(BadInput, match="has no dial 'step'; did you mean 'steps'"):
        drawn("chain", 1, {"step": 3})


def test_a_puzzle_of_ones_own_can_be_graded() -> None:
    assert puzzles.get("grade:coin:puzzle") == grade.get("grade:coin:puzzle")
    problem = puzzles.problems("grade:coin:puzzle", 1, 1, held_out=False)[0]
    assert problem.puzzle == "grade:coin:puzzle" and problem.data["problem"]["puzzle"] == "coin:puzzle"
    assert puzzles.get(problem.puzzle).verify(problem, puzzles.get(problem.puzzle).solve(problem) or "") is Verdict.RIGHT


def test_a_grader_can_be_evaluated_as_a_task() -> None:
    plan = Plan(task="grade:chain", problems=20, dials={"steps": 2})
    found = suite.problems(plan)
    assert suite.task_of(plan) and len(found) == 20 and all(p.puzzle == "grade:chain" and puzzles.held_out(p.key) for p in found)
    with pytest.raises(BadInput, match="cannot be graded"):
        suite.task_of(Plan(task="grade:needle"))


def test_attempts_are_tries_with_or_without_a_thought() -> None:
    problem = puzzles.problems("chain", 1, 1, held_out=False)[0]
    tries = [chain.attempt(problem, random.Random(i)) for i in range(200)]
    assert {bool(t.thought) for t in tries} == {True, False} and all(isinstance(t, Trace) and t.answer for t in tries)
