"""Verdicts on outputs: by puzzles, and by verifiers in TRL's signature."""

from collections.abc import Sequence
from typing import Any

import pytest

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.post.verifiers import base, get, judge, scores, written

PROBLEM = puzzles.problems("countdown", 1, 0, held_out=False)[0]
ANSWER = str(puzzles.get("countdown").solve(PROBLEM))
R, W, A, U = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN, Verdict.UNJUDGED


def output(text: str, reasoning: str | None = "thought", finish: str = "stop") -> Output:
    return Output([1, 2], [0.0, 0.0], finish, text, reasoning)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (output(ANSWER), R),
        (output(f" {ANSWER}\n", ""), R),
        (output("none"), A),
        (output("1+1"), W),
        (output(""), W),
        (output(ANSWER, finish="length"), W),
        (output("none", finish="length"), W),
        (output("", ANSWER, "length"), W),
        (output("", ANSWER), W),  # an answer that stands in a thought that was never closed was not given
        (output(ANSWER, None), R),  # a model that does not think
    ],
)
def test_a_puzzle_judges_what_was_said_to_its_end(said: Output, expected: Verdict) -> None:
    assert judge([PROBLEM], [[said]]).verdicts == [[expected]]


def test_each_problem_is_judged_by_its_own_puzzle() -> None:
    chain = puzzles.problems("chain", 1, 0, held_out=False)[0]
    right = str(puzzles.get("chain").solve(chain))
    assert judge([chain, PROBLEM], [[output(right), output(ANSWER)], [output(ANSWER)]]).verdicts == [[R, W], [R]]


def asked(n: int, verifier: str, **columns: Any) -> list[Problem]:
    return [Problem("file", f"question {i}", f"key {i}", {"answer": str(i), **columns}, f"{__name__}:{verifier}") for i in range(n)]


def echoes(prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any) -> list[float | None]:
    """Right if the answer is the gold column's; half right never is; "?" cannot be judged."""
    assert len(prompts) == len(completions) == len(completion_ids) == len(columns["answer"])
    found = base.answers(completions)
    return [None if a == "?" else float("nan") if a == "nan" else 0.5 if a == "half" else float(a == gold)
            for a, gold in zip(found, columns["answer"], strict=True)]  # fmt: skip


def test_a_named_verifier_gives_three_kinds_of_verdict() -> None:
    said = [[output("0"), output("1"), output("?")], [output("1", None), output("half"), output("nan")]]
    judged = judge(asked(2, "echoes"), said)
    assert judged.verdicts == [[R, W, U], [R, W, U]]
    assert "gave no score" in judged.trouble
    assert judge(asked(1, "echoes"), [[output("0")]]).trouble == ""


calls: list[int] = []


def breaks_on_seven(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    calls.append(len(prompts))
    if any("7" in c for c in completions):
        raise ZeroDivisionError("seven")
    return [1.0] * len(prompts)


def test_a_verifier_that_an_answer_breaks_judges_all_the_others() -> None:
    """verl PR 5635: an exception that was swallowed made every reward 0."""
    calls.clear()
    judged = judge(asked(1, "breaks_on_seven"), [[output(str(i)) for i in range(10)]])
    assert judged.verdicts == [[R] * 7 + [U] + [R] * 2]
    assert "ZeroDivisionError: seven" in judged.trouble
    assert calls == [10] + [1] * 10


def too_few(prompts: Sequence[str], **columns: Any) -> list[float | None]:
    return [1.0]


def test_a_verifier_that_gives_too_few_scores_is_refused() -> None:
    with pytest.raises(BadInput, match="gave 1 scores for 2 completions"):
        judge(asked(2, "too_few"), [[output("a")], [output("b")]])


def test_what_was_not_finished_is_wrong_and_not_asked_about() -> None:
    calls.clear()
    judged = judge(asked(1, "breaks_on_seven"), [[output("7", finish="length"), output("", "7")]])
    assert judged.verdicts == [[W, W]] and not calls


def test_problems_of_different_columns_are_judged_apart() -> None:
    problems = [*asked(1, "echoes"), *asked(1, "echoes", level=3)]
    assert scores(f"{__name__}:echoes", problems, [output("0"), output("0")])[0] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (output("4", "2+2"), "<think>2+2</think>4"),
        (output("4", None), "4"),
        (output("", "2+2"), "<think>2+2"),
        (output("a</think>b", "2"), "<think>2</think>a</think>b"),
    ],
)
def test_a_completion_is_read_back_as_it_was_written(said: Output, text: str) -> None:
    assert written(said) == text
    assert base.split(text) == (said.reasoning, said.text or None)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "no verifier 'nothing'"),
        ("nowhere:f", "cannot be loaded: ModuleNotFoundError"),
        (f"{__name__}:ANSWER", "is no function"),
    ],
)
def test_an_unknown_verifier_is_refused_in_one_sentence(name: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        get(name)
