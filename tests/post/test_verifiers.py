"""Verdicts on outputs, and the built-in reward in TRL's signature."""

import pytest

from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.post.verifiers import puzzle_reward, verdict

PROBLEM = puzzles.problems("countdown", 1, 0, held_out=False)[0]
ANSWER = str(puzzles.get("countdown").solve(PROBLEM))


def output(text: str, reasoning: str | None = "x", finish: str = "stop") -> Output:
    return Output([], [], finish, text, reasoning)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (output(ANSWER), Verdict.RIGHT),
        (output(f" {ANSWER}\n", ""), Verdict.RIGHT),
        (output("none"), Verdict.ABSTAIN),
        (output("1+1"), Verdict.WRONG),
        (output(""), Verdict.WRONG),
        (output(ANSWER, finish="length"), Verdict.WRONG),
        (output("none", finish="length"), Verdict.WRONG),
        (output("", None, "length"), Verdict.WRONG),
        (output(ANSWER, None), Verdict.WRONG),  # an answer that stands in the thought was not given
    ],
)
def test_verdict(said: Output, expected: Verdict) -> None:
    assert verdict(PROBLEM, said) is expected


def test_a_chain_problem_is_judged_by_its_own_puzzle() -> None:
    chain = puzzles.problems("chain", 1, 0, held_out=False)[0]
    assert verdict(chain, output(str(puzzles.get("chain").solve(chain)))) is Verdict.RIGHT
    assert verdict(chain, output(ANSWER)) is Verdict.WRONG


def test_the_reward_has_trls_signature() -> None:
    problems: list[Problem] = puzzles.problems("chain", 4, 1, held_out=False)
    answers = [puzzles.get("chain").solve(p) for p in problems]
    texts = [f"steps</think>{answers[0]}", f"</think>{answers[1]}0", str(answers[2]), f"a</think>{answers[3]}</think>"]
    found = puzzle_reward([p.prompt for p in problems], texts, [[1]] * 4, problem=problems, trainer_state=None, other=["x"] * 4)
    assert found == [1.0, 0.0, 0.0, 0.0] and all(type(r) is float for r in found)
    named = puzzle_reward(prompts=[problems[0].prompt], completions=texts[:1], completion_ids=[[1]], problem=problems[:1])
    assert named == [1.0]
    assert puzzle_reward([], [], [], problem=[]) == []
    with pytest.raises(KeyError):
        puzzle_reward(["a"], ["b"], [[1]])
    with pytest.raises(ValueError):
        puzzle_reward(["a"], ["b"], [[1]], problem=[])
