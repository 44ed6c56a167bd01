"""Needles: the scorer against cases made by hand, the lengths and depths that were asked for, and recall of known seekers."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from pascaline import tokenizer as tokenizers
from pascaline.data import puzzles
from pascaline.data.puzzles import needle as puzzle
from pascaline.eval import needle
from pascaline.tokenizer import Tokenizer

PROBLEM = puzzle.write("calm-boat", "1234567", 3, 1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = (f"{p.prompt}\n{puzzle.opening(p)} {p.data['value']}." for p in puzzles.problems("needle", 60, 3, held_out=False))
    return tokenizers.train(texts, 400)


class Seeker:
    """An engine that says the number if it stands among the last `reach` tokens of the prompt, else another one."""

    def __init__(self, tokenizer: Tokenizer, reach: int = 10**9):
        self.tokenizer, self.reach, self.asked = tokenizer, reach, list[list[int]]()

    def generate(self, prompts: list[list[int]], sampling: Any) -> list[list[Any]]:
        assert sampling.temperature == 0 and sampling.n == 1
        self.asked += prompts
        seen = [re.search(r"is: (\d{7})\.", self.tokenizer.decode(ids[-self.reach :])) for ids in prompts]
        return [[SimpleNamespace(text=f" {found[1] if found else '7777777'}.\nAnswer")] for found in seen]


@pytest.mark.parametrize("said", [" 1234567.", "1234567", "\n1234567.\nAnswer: 1", " 1234567 and", " 1234567", " 1234567. 8", " 1234567!"])
def test_the_number_alone_is_right(said: str) -> None:
    assert needle.score(PROBLEM, said)


@pytest.mark.parametrize(
    "said",
    ["", " ", " 123456", " 12345678", " 1234567a", " 1234567.5", " 1234567,890", " 7654321. 1234567", " the 1234567", " -1234567",
     " 1_234567", " 1234567_", " １２３４５６７", " 1 234567", ": 1234567", " 123456 7"],
)  # fmt: skip
def test_anything_else_is_wrong(said: str) -> None:
    assert not needle.score(PROBLEM, said)


def test_the_form_is_rulers() -> None:
    lines = PROBLEM.prompt.split("\n")
    assert lines[0].startswith("A special magic number is hidden within the following text. Make sure to memorize it.")
    assert lines[1] == lines[3] == lines[4] == "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert lines[2] == "One of the special magic numbers for calm-boat is: 1234567."
    assert lines[5:] == ["What is the special magic number for calm-boat mentioned in the provided text?"]
    assert puzzle.opening(PROBLEM) == "The special magic number for calm-boat mentioned in the provided text is"


@pytest.mark.parametrize("length", [200, 256, 500, 1024])
@pytest.mark.parametrize("depth", needle.DEPTHS)
def test_a_needle_fills_the_length_and_stands_at_the_depth(tokenizer: Tokenizer, length: int, depth: float) -> None:
    for problem in puzzles.problems("needle", 20, 1, held_out=True):
        filled = needle.fill(problem, tokenizer, length, depth)
        assert filled is not None and filled.key == problem.key
        refrain = len(tokenizer.encode(puzzle.REFRAIN + "\n"))
        used = len(needle.prompt(filled, tokenizer)) + needle.ANSWER_TOKENS
        assert length - refrain < used <= length
        assert filled.data["before"] == round(depth * filled.data["refrains"])
        lines = filled.prompt.split("\n")
        assert (
            lines.index(f"One of the special magic numbers for {problem.data['key']} is: {problem.data['value']}.")
            == filled.data["before"] + 1
        )


def test_a_length_without_room_is_left_out(tokenizer: Tokenizer) -> None:
    engine, calls = Seeker(tokenizer), []
    rows = needle.recall(engine, [64, 300], 2, watch=lambda: calls.append(1))  # type: ignore[arg-type]
    assert [row["length"] for row in rows] == [300] and len(calls) == 2 and needle.fill(PROBLEM, tokenizer, 64, 0.5) is None


def test_recall_of_one_that_sees_all_and_of_one_that_sees_the_end(tokenizer: Tokenizer) -> None:
    engine = Seeker(tokenizer)
    rows = needle.recall(engine, [256, 512, 1024], 4)  # type: ignore[arg-type]
    assert [(row["recall"], row["high"], row["n"]) for row in rows] == [(1.0, 1.0, 20)] * 3 and all(0.8 < row["low"] < 0.9 for row in rows)
    assert all(len(ids) + needle.ANSWER_TOKENS <= 1024 for ids in engine.asked) and len({tuple(ids) for ids in engine.asked}) == 60
    (row,) = needle.recall(Seeker(tokenizer, 600), [1024], 4)  # type: ignore[arg-type]
    assert [(cell["depth"], cell["recall"], cell["n"]) for cell in row["by_depth"]] == [
        (0.0, 0.0, 4), (0.25, 0.0, 4), (0.5, 1.0, 4), (0.75, 1.0, 4), (1.0, 1.0, 4)
    ]  # fmt: skip
    assert row["recall"] == 0.6 and row["low"] < 0.6 < row["high"]


def test_no_needle_is_one_of_training(tokenizer: Tokenizer) -> None:
    engine = Seeker(tokenizer)
    needle.recall(engine, [300], 8)  # type: ignore[arg-type]
    asked = {re.search(r"for (\S+) is: (\d+)", tokenizer.decode(ids)).groups() for ids in engine.asked}  # type: ignore[union-attr]
    trained = {(p.data["key"], p.data["value"]) for p in puzzles.problems("needle", 5000, needle.SEED, held_out=False)}
    assert len(asked) == 40 and not asked & trained
    assert all(puzzles.held_out(f"needle {key} {value}") for key, value in asked)
