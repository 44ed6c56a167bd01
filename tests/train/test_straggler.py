"""Who is named, and when."""

import pytest

from pascaline.train.straggler import PATIENCE, SHOWN, Stragglers


def told(steps: list[list[float]]) -> list[tuple[int, str]]:
    judge = Stragglers()
    notes = [judge.judge(own)[1] for own in steps]
    return [(step, note) for step, note in enumerate(notes, 1) if note]


def test_a_rank_that_stays_slow_is_named_once() -> None:
    ((step, note),) = told([[1.0, 1.1, 1.5, 1.0]] * 3 * PATIENCE)
    assert step == PATIENCE and note.startswith("rank 2 ") and "1.5 times" in note


@pytest.mark.parametrize("break_", [[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
def test_one_that_recovers_or_takes_turns_is_not(break_: list[float]) -> None:
    slow = [[1.0, 1.0, 2.0]] * (PATIENCE - 1)
    assert not told([*slow, break_, *slow])
    assert told([*slow, break_, *slow, slow[0]])


def test_ratio_of_two_and_of_many() -> None:
    assert Stragglers().judge([2.0, 1.0])[0] == 2.0
    assert Stragglers().judge([1.0, 1.0, 4.0, 2.0])[0] == 4.0
    assert SHOWN > Stragglers().judge([1.0, 1.05])[0] == pytest.approx(1.05)
