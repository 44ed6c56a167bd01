"""Problems from files: what is read, how it is split, and what a mistake in a file is told as."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pascaline.data import puzzles
from pascaline.data.puzzles import Trace
from pascaline.data.puzzles.families import Family
from pascaline.errors import BadInput
from pascaline.tables import Puzzle

GSM = "He sells 16 - 3 = <<16-3=13>>13 eggs.\nThat makes 13 * 2 = $<<13*2=26>>26.\n#### 1,026"


def write(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def numbered(path: Path, count: int, start: int = 0) -> str:
    return write(path, *({"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(start, start + count)))


def family(file: str, **keys: Any) -> Family:
    return Family("mine", Puzzle(file=file, verifier="integer", **keys))


def test_a_row_is_a_problem_with_its_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "How many?", "answer": GSM, "level": 3}, "", {"question": "Why?", "answer": "1"})
    found = family(path, columns={"language": "en"}).side(False) + family(path, columns={"language": "en"}).side(True)
    assert {p.prompt for p in found} == {"How many?", "Why?"}
    problem = next(p for p in found if p.prompt == "How many?")
    assert (problem.puzzle, problem.verifier) == ("mine", "integer")
    assert problem.data == {"answer": GSM, "level": 3, "language": "en"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": GSM}, Trace("He sells 16 - 3 = 13 eggs.\nThat makes 13 * 2 = $26.", "1,026")),
        ({"answer": "7", "reasoning": "3 + 4"}, Trace("3 + 4", "7")),
        ({"solution": 7}, Trace("", "7")),
    ],
)
def test_a_trace_is_the_worked_solution_of_the_file(tmp_path: Path, row: dict[str, Any], expected: Trace) -> None:
    side = family(write(tmp_path / "a.jsonl", {"prompt": "p", **row}), test=write(tmp_path / "b.jsonl", {"prompt": "q"}))
    assert side.trace(side.problems(1, 0, False)[0], random.Random(0)) == expected


def test_without_solutions_there_is_nothing_to_learn_from(tmp_path: Path) -> None:
    side = family(write(tmp_path / "a.jsonl", {"prompt": "p"}), test=write(tmp_path / "b.jsonl", {"prompt": "q"}))
    with pytest.raises(BadInput, match="no solutions to learn from"):
        side.trace(side.problems(1, 0, False)[0], random.Random(0))


def test_one_file_is_split_by_the_hash_of_its_problems(tmp_path: Path) -> None:
    both = family(numbered(tmp_path / "a.jsonl", 800))
    train, held = both.side(False), both.side(True)
    assert len(train) + len(held) == 800 and 60 < len(held) < 140
    assert all(puzzles.held_out(p.key) for p in held) and not any(puzzles.held_out(p.key) for p in train)


def test_what_is_in_the_test_file_is_never_trained_on(tmp_path: Path) -> None:
    """In another writing, too: the leak that is met in practice."""
    test = write(
        tmp_path / "t.jsonl", {"question": " WHAT is 3 +\n1?", "answer": "4"}, *({"question": f"What is {i} + 1?"} for i in (5, 900))
    )
    split = family(numbered(tmp_path / "a.jsonl", 20), test=test)
    assert len(split.side(False)) == 18 and len(split.side(True)) == 3
    drawn = split.problems(200, 1, held_out=False)
    assert {p.prompt for p in drawn} == {f"What is {i} + 1?" for i in range(20) if i not in (3, 5)}


def test_training_draws_go_through_the_file_again_and_again(tmp_path: Path) -> None:
    side = family(numbered(tmp_path / "a.jsonl", 10), test=numbered(tmp_path / "b.jsonl", 3, start=100))
    drawn = [p.prompt for p in side.problems(25, 7, held_out=False)]
    assert (
        drawn == [p.prompt for p in side.problems(40, 7, held_out=False)][:25] != [p.prompt for p in side.problems(25, 8, held_out=False)]
    )
    for start in (0, 10):
        assert len(set(drawn[start : start + 10])) == 10  # each once before any comes again
    assert drawn[:10] != drawn[10:20]


def test_held_out_problems_are_all_different(tmp_path: Path) -> None:
    test = write(tmp_path / "b.jsonl", *({"question": q, "answer": "1"} for q in ("a", "b", "A", "b ", "c")))
    side = family(numbered(tmp_path / "a.jsonl", 3), test=test)
    assert sorted(p.prompt for p in side.problems(3, 1, held_out=True)) == ["a", "b", "c"]
    with pytest.raises(BadInput, match="has 3 held-out problems, 4 were asked for"):
        side.problems(4, 1, held_out=True)


def test_a_conversation_of_one_message_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": "Why?"}]}, {"question": "b"})
    side = family(path, test=write(tmp_path / "b.jsonl", {"prompt": "q"}))
    assert [p.prompt for p in side.side(False)] == ["Why?", "b"]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (["{"], "a.jsonl line 1 is not JSON"),
        ([{"question": "a"}, "[1]"], "line 2 is no JSON object"),
        ([{"text": "a", "id": 1}], "line 1 has no problem: it needs one of the columns prompt, question, problem, and has text, id"),
        ([{"prompt": " "}], "line 1: prompt must be a text"),
        ([{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], "a conversation of one user message"),
        ([{"prompt": "a", "completions": "b"}], "a column may not be called completions"),
        ([""], "holds no problem"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path: Path, rows: list[Any], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        family(write(tmp_path / "a.jsonl", *rows)).side(False)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no file .*gone\.jsonl"):
        family(str(tmp_path / "gone.jsonl")).side(False)
    with pytest.raises(BadInput, match="is no text file"):
        family(str(tmp_path)).side(False)


def test_a_puzzle_may_have_another_judge() -> None:
    found = Family("chain", Puzzle(verifier="integer", columns={"unit": "m"}, dials={"steps": 3})).problems(2, 1, False)
    plain = puzzles.problems("chain", 2, 1, False, steps=3)
    assert [(p.key, p.verifier, p.data) for p in found] == [(p.key, "integer", {**p.data, "unit": "m"}) for p in plain]
