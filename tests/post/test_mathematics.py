"""The verifier `math`: what is right, what an answer singles out, and that no answer hurts another."""

import importlib.util
from typing import Any

import pytest

from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.errors import BadInput
from pascaline.post.verifiers import get, judge, latex, mathematics, pool
from pascaline.post.verifiers.mathematics import math


def scores(golds: list[Any], said: list[str], column: str = "answer") -> list[float | None]:
    return math(["?"] * len(said), said, [[1]] * len(said), **{column: golds})


RIGHT = [
    ("7", "7"),
    ("7", " 7.\n"),
    ("7", "There are 7 apples."),
    ("7", "The answer is 7. For 3 + 4 = 7."),
    ("7", "3 + 4 is 7, so it is 7.\n**Answer:** 7"),
    ("7", "The answer is:\n\n$7$"),
    ("7", "#### Step 1\n3 + 4\n#### Final\nThe answer is \\boxed{7}."),
    ("7", "3 + 4 = 7\n#### 7"),
    ("7", "So $x = 7$."),
    ("7", "\\boxed{7} and so \\boxed{ 7 }"),
    ("7", "7 cm"),
    ("7", "\\boxed{7\\text{ cm}}"),
    ("5", "It costs $5 now"),
    ("1000", "He has 1,000 coins."),
    ("-3", "x is -3"),
    ("3.14", "The answer is 3.14."),
    ("3/4 = 0.75, #### 0.75", "\\frac{3}{4}"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac12", "\\(\\frac{2}{4}\\) meters"),
    ("\\frac12", "1/2 meters"),
    ("so it is \\boxed{\\frac{\\sqrt{3}}{2}}, of course", "\\sqrt{3}/2"),
    ("$x+1$", "1+x"),
    ("x^2-1", "\\boxed{(x-1)(x+1)}"),
    ("\\{1,2,7\\}", "$1$, $2$ and $7$"),
    ("(1,2)", "(1, 2)"),
    ("1.5", "\\boxed{1\\frac12}"),
    ("(A)", "The answer is (A)."),
    ("blue whale", "The answer is blue whale."),
    ("\\text{east}", "East"),
    (7, "7"),
    (0.25, "1/4"),
]
WRONG = [
    ("7", "8"),
    ("7", "-7"),
    ("7", ""),
    ("7", "seven"),
    ("7", "1 2 3 4 5 6 7"),  # math-verify by itself takes the last number of each of these
    ("7", "1, 2, 3, 4, 5, 6, 7"),
    ("7", "1\n2\n3\n7"),
    ("7", "3 plus 4 is 7"),
    ("7", "We have $3$ and $4$, so $7$"),
    ("7", "$1$, $2$, $3$, $4$, $5$, $6$, $7$"),
    ("7", "the answer is 1 2 3 7"),
    ("7", "The answer is 3. The answer is 7."),
    ("7", "\\boxed{3}, no: \\boxed{7}"),
    ("7", "\\boxed{1, 2, 3, 7}"),
    ("7", "\\boxed{garbage 1 2 7}"),
    ("7", "7 or 8"),
    ("7", "1 2 4"),  # which math-verify adds up
    ("7", "\\boxed{1 2 4}"),
    ("7", "n + 7 apples"),
    ("5", "the area is 5\\pi"),
    ("7", "\\boxed{7"),
    ("7", "\\boxed{"),
    ("7", "\\frac{"),
    ("east", "west"),
    ("x+1", "x-1"),
]


@pytest.mark.parametrize(("pairs", "score"), [(RIGHT, 1.0), (WRONG, 0.0)])
def test_what_is_right_and_what_is_wrong(pairs: list[tuple[Any, str]], score: float) -> None:
    found = scores([gold for gold, _ in pairs], [said for _, said in pairs])
    assert [pair for pair, one in zip(pairs, found, strict=True) if one != score] == []


def test_math_verify_alone_takes_the_last_number_of_any_text() -> None:
    """Why it is fenced: when this fails, it need be no more."""
    from math_verify import parse, verify

    assert verify(parse("7", parsing_timeout=None), parse("1 2 3 4 5 6 7", parsing_timeout=None), timeout_seconds=None)


def test_thoughts_are_stripped_and_one_that_is_not_closed_is_no_answer() -> None:
    assert scores(["7"] * 3, ["<think>8</think>7", "<think>7</think>8", "<think>\\boxed{7}"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("column", ["answer", "solution", "ground_truth", "label"])
def test_the_gold_answer_stands_in_one_of_four_columns(column: str) -> None:
    assert scores(["The sum is $3+4$, so \\boxed{7}."], ["7"], column) == [1.0]


def test_a_missing_column_is_said() -> None:
    with pytest.raises(BadInput, match="'math' needs a column answer or solution"):
        scores(["7"], ["7"], "gold")


@pytest.mark.parametrize(
    "gold", ["", "12 or so of 30 apples", "10 000", "\\frac{", "9" * 5000, "\\boxed{3} or \\boxed{4}", None, True, ["7"]]
)
def test_a_gold_answer_that_cannot_be_read_is_never_silently_wrong(gold: Any) -> None:
    with pytest.raises(BadInput, match="gold answer"):
        scores(["7", gold], ["7", "7"])


def test_a_missing_library_is_said_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install pascaline\[math\]"):
        scores(["7"], ["7"])


HANGS = ["\\boxed{9^{9^{9^9}}}", "\\boxed{" + "(" * 400 + "1" + ")" * 400 + "}", "\\boxed{100000000!}", "\\boxed{10^{10^{10}}}"]
QUICK = [
    "9**9**9**9", "(" * 5000 + "1" + ")" * 5000, "\\boxed{" + "\\frac{1}{" * 300 + "2" + "}" * 300 + "}", "9" * 100000,
    "\\boxed{" + "9" * 900 + "}", "\\boxed{" * 3000, "$" * 50001, "\\(" * 50000, "a " * 50000, "answer is " * 20000, "7 and " * 30000,
    "\\boxed{" + "x^" * 400 + "2}", "\x00", "\ud800", "####" * 9000,
]  # fmt: skip


def test_hostile_answers_are_never_right_and_the_others_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Math-Verify 50, verl PR 5635, AReaL 1426: a hung verification made other answers wrong, or ate the pool."""
    monkeypatch.setattr(mathematics, "SECONDS", 2.0)
    said, golds, expected = [], [], []
    for i, hostile in enumerate(HANGS + QUICK):
        said += [hostile, f"\\boxed{{{i}}}", f"The answer is {i}.", f"\\boxed{{{i + 1}}}"]
        golds += ["7"] + [str(i)] * 3
        expected += [1.0, 1.0, 0.0]
    before = pool.shared(2.0).kills
    found = scores(golds, said)
    assert [one for i, one in enumerate(found) if i % 4] == expected
    assert found[: 4 * len(HANGS) : 4] == [None] * len(HANGS)
    assert set(found[4 * len(HANGS) :: 4]) <= {None, 0.0}
    assert pool.shared(2.0).kills - before == found.count(None)
    pool.shared(2.0).close()


def test_problems_are_judged_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "SECONDS", 1.0)
    assert get("math") is math
    problem = Problem("file", "3 + 4 = ?", "k", {"answer": "... #### 7"}, "math")
    said = [Output([1], [0.0], "stop", text, None) for text in ("7", "8", HANGS[0])]
    judged = judge([problem], [said])
    assert judged.verdicts == [[Verdict.RIGHT, Verdict.WRONG, Verdict.UNJUDGED]]
    assert "gave no score" in judged.trouble
    pool.shared(1.0).close()


def test_it_works_in_a_thread() -> None:
    """Where SIGALRM raises, and every score was 0 (verl PR 5635)."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda i: scores([str(i)], [f"\\boxed{{{i}}}"]), range(9))) == [[1.0]] * 9


@pytest.mark.parametrize(("text", "said"), [("\\boxed 7", "7"), ("\\boxed{a{b}\\}c}", "a{b}\\}c"), ("x + 1 = 2", "x + 1 = 2")])
def test_what_an_answer_singles_out(text: str, said: str) -> None:
    assert latex.final(text) == said
