"""The schedules at their corners."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.tables import Optim, Stage
from pascaline.train.schedule import balance_rate, learning_rate, mtp_weight, ramp


def rates(steps: int, **changes) -> list[float]:
    optim = Optim(**{"lr": 2.0, "warmup": 0, "final": 0.1, "decay": 0.2, **changes})
    return [learning_rate(optim, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_from_the_first_step_to_the_peak(schedule):
    found = rates(100, warmup=10, schedule=schedule)
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[9] == max(found) == 2.0 and found[0] > 0


def test_constant_stays():
    assert rates(50, schedule="constant", warmup=5)[4:] == [2.0] * 46


def test_cosine_ends_at_final_and_is_half_way_in_the_middle():
    found = rates(101, schedule="cosine", warmup=1)
    assert found[-1] == pytest.approx(0.2) and found[50] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    for i, rate in enumerate(found[1:], 1):
        assert rate == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * i / 100)) / 2)


def test_wsd_stays_then_falls_in_a_line_to_final():
    found = rates(110, schedule="wsd", warmup=10, decay=0.2)
    assert found[9:90] == [pytest.approx(2.0)] * 81
    assert found[-1] == pytest.approx(0.2) and found[99] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    falls = [a - b for a, b in itertools.pairwise(found[89:])]
    assert falls == pytest.approx([1.8 / 20] * 20)


def test_wsd_without_decay_stays():
    assert rates(20, schedule="wsd", decay=0.0) == [pytest.approx(2.0)] * 20


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["constant", "cosine", "wsd"]), st.integers(1, 60), st.integers(0, 80), st.floats(0, 1), st.floats(0, 1))
def test_any_schedule_stays_between_nothing_and_the_peak_and_falls_after_warm_up(schedule, steps, warmup, decay, final):
    """Also one step, and a warm-up longer than the run."""
    found = rates(steps, schedule=schedule, warmup=warmup, decay=decay, final=final)
    assert all(0 <= rate <= 2.0 * (1 + 1e-9) and math.isfinite(rate) for rate in found)
    after = found[warmup:]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(after))
    if after and (schedule == "cosine" or (schedule == "wsd" and decay > 0)):
        assert after[-1] == pytest.approx(2.0 * final, abs=1e-9)


# ---- balancing, multi-token weight, tokens a step --------------------------------------------------------------------


def test_gamma_and_lambda_change_at_their_share():
    """V3: gamma stops after 14.3T of 14.8T tokens, lambda falls from .3 to .1 after 10T."""
    stage = Stage(balance_rate=0.001, balance_until=0.97, mtp=0.3, mtp_until=0.68, mtp_final=0.1)
    gammas = [balance_rate(stage, step, 100) for step in range(100)]
    lambdas = [mtp_weight(stage, step, 100) for step in range(100)]
    assert gammas == [0.001] * 97 + [0.0] * 3 and lambdas == [0.3] * 68 + [0.1] * 32
    assert balance_rate(Stage(), 99, 100) == 1e-3 and mtp_weight(Stage(), 99, 100) == 0.3
    assert mtp_weight(Stage(mtp=0.05, mtp_until=0.5), 99, 100) == 0.05  # never up


@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(1, 20), st.integers(1, 20), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_a_ramp_grows_to_the_full_step_and_trains_what_was_promised(tokens, row, first, more, until):
    rows = first + more
    plan = ramp(tokens, row, rows, first, until)
    assert plan == sorted(plan) and plan[0] == (first if until else rows) and max(plan) <= rows
    assert row * sum(plan) >= tokens > row * sum(plan[:-1])
    seen = [row * sum(plan[:i]) for i in range(len(plan))]
    assert all(n == rows for n, s in zip(plan, seen, strict=True) if s >= until)


def test_without_a_ramp_all_steps_are_full():
    assert ramp(1000, 10, 7, 7, 500) == [7] * 15
