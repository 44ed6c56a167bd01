"""Advantages of a group, against a formula written here on its own."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascaline.data.puzzles import Verdict
from pascaline.post.grpo import advantages, rewards

R, W, A = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN
GROUPS = st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(st.sampled_from([R, W, A]), min_size=n, max_size=n), min_size=1, max_size=4))


def right(groups: list[list[Verdict]]) -> np.ndarray:
    return np.array([[v is R for v in group] for group in groups])


def all_judged(groups: list[list[Verdict]]) -> np.ndarray:
    return np.ones((len(groups), len(groups[0])), bool)


def by_hand(group: list[float]) -> list[float]:
    mean = math.fsum(group) / len(group)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
    return [(r - mean) / deviation for r in group]


def whole(groups: list[list[Verdict]], wrong: float) -> np.ndarray:
    """Rewards of answers none of which was cut off."""
    return rewards(groups, np.zeros((len(groups), len(groups[0])), bool), wrong)


def test_rewards() -> None:
    assert whole([[R, W], [A, R]], -0.25).tolist() == [[1.0, -0.25], [0.0, 1.0]]
    assert whole([[R, W], [A, R]], 0.0).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    cut = np.array([[False, True], [False, False]])
    assert rewards([[R, W], [A, R]], cut, -0.25).tolist() == [[1.0, 0.0], [0.0, 1.0]]  # cut off is not a false claim


@given(groups=GROUPS, wrong=st.sampled_from([0.0, -0.1, -0.5, -1.0]))
def test_advantages_are_the_standardised_rewards_of_groups_with_both_kinds(groups: list[list[Verdict]], wrong: float) -> None:
    found, flat = advantages(whole(groups, wrong), right(groups), all_judged(groups))
    worth = {R: 1.0, A: 0.0, W: wrong}
    for group, row, is_flat in zip(groups, found, flat, strict=True):
        assert is_flat == (R not in group or set(group) == {R})
        expected = [0.0] * len(group) if is_flat else by_hand([worth[v] for v in group])
        assert row == pytest.approx(expected, abs=1e-4)
        assert row.sum() == pytest.approx(0, abs=1e-9)
        if not is_flat:
            assert all(row[i] > 0 for i, v in enumerate(group) if v is R)
            assert row.std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("group", [[W, A, A, W], [A, A, W, A], [W, W, W, W], [A, A, A, A], [R, R, R, R]])
@pytest.mark.parametrize("wrong", [0.0, -0.2, -1.0])
def test_a_group_without_a_right_and_another_answer_carries_no_gradient(group: list[Verdict], wrong: float) -> None:
    """Whatever false claims cost: a group that is nowhere right must not teach to give up."""
    found, flat = advantages(whole([group], wrong), right([group]), all_judged([group]))
    assert flat.tolist() == [True] and not found.any()


def test_groups_do_not_see_each_other() -> None:
    groups = [[R, W, W, W], [R, R, R, W], [R, A, W, W]]
    together, _ = advantages(whole(groups, -0.5), right(groups), all_judged(groups))
    for group, row in zip(groups, together, strict=True):
        alone, _ = advantages(whole([group], -0.5), right([group]), all_judged([group]))
        assert (alone[0] == row).all()
    assert together[2, 1] > together[2, 2]  # giving up is worth more than a false claim


@given(groups=GROUPS, data=st.data())
def test_what_could_not_be_judged_is_as_if_it_had_not_been_sampled(groups: list[list[Verdict]], data: st.DataObject) -> None:
    judged = np.array([[data.draw(st.booleans()) for _ in group] for group in groups])
    found, flat = advantages(whole(groups, -0.5), right(groups), judged)
    for i, group in enumerate(groups):
        left = [v for v, is_judged in zip(group, judged[i], strict=True) if is_judged]
        assert not found[i][~judged[i]].any()
        if not left:
            assert flat[i]
            continue
        alone, is_flat = advantages(whole([left], -0.5), right([left]), all_judged([left]))
        assert flat[i] == is_flat[0]
        assert found[i][judged[i]] == pytest.approx(alone[0])
