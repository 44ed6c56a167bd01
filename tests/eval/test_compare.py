"""Two results beside each other: by hand, and against what the numbers are by definition."""

from itertools import product
from typing import Any

import pytest

from pascaline.errors import BadInput
from pascaline.eval import passk, tables
from pascaline.eval.compare import compare, leave_one_out, pair, sign_test
from pascaline.eval.plan import measured


def model(name: str, **tasks: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "tasks": tasks}


def task(*values: float | None, better: str = "higher", unit: str = "share", plan: dict[str, Any] | None = None) -> dict[str, Any]:
    return measured(values, [f"k{i}" for i in range(len(values))], better, unit, plan=plan or {})


def test_what_was_lost_is_told_and_not_only_what_was_gained() -> None:
    before = model("a", chain=task(1, 1, 0, 0, 0.5, 1), other=task(1, 1, 1, 1))
    after = model("b", chain=task(1, 0, 1, 1, 0.75, None), other=task(0, 0, 1, 0))
    found = pair(before, after)
    assert [row["task"] for row in found["tasks"]] == ["other", "chain"]  # most lost first
    other, chain = found["tasks"]
    assert (other["gained"], other["lost"], other["lost_keys"]) == (0, 3, ["k0", "k1", "k3"]) and other["lost_share"] == 0.75
    assert (chain["gained"], chain["lost"], chain["n"]) == (3, 1, 5) and chain["lost_keys"] == ["k1"]  # the sixth has no verdict
    assert chain["gained_keys"] == ["k2", "k3", "k4"] and chain["before"] == 0.5 and chain["after"] == pytest.approx(0.75)
    expected = passk.paired_difference([1, 0, 1, 1, 0.75], [1, 1, 0, 0, 0.5])
    assert (chain["difference"], chain["low"], chain["high"]) == pytest.approx(expected)


def test_half_of_the_samples_is_not_solved() -> None:
    (row,) = pair(model("a", t=task(0.5, 0.51, 0.4)), model("b", t=task(0.5, 0.5, 0.6)))["tasks"]
    assert (row["gained_keys"], row["lost_keys"]) == (["k2"], ["k1"])


def test_where_less_is_better_more_is_a_loss() -> None:
    before, after = task(2.0, 3.0, 4.0, better="lower", unit="nats"), task(2.5, 2.5, 4.0, better="lower", unit="nats")
    (row,) = pair(model("a", ppl=before), model("b", ppl=after))["tasks"]
    assert (row["gained_keys"], row["lost_keys"], row["difference"]) == (["k1"], ["k0"], 0.0)
    shares = pair(model("a", t=task(0, 1, better="lower")), model("b", t=task(1, 1, better="lower")))["tasks"][0]
    assert (shares["gained"], shares["lost"]) == (0, 1)


def test_values_that_are_no_shares_are_not_cut() -> None:
    found = task(2.0, 4.0, 9.0, better="lower", unit="nats")
    assert found["score"] == 5.0 and found["high"] > 9 and found["low"] < 2
    (row,) = pair(model("a", p=found), model("b", p=task(12.0, 24.0, 29.0, better="lower", unit="nats")))["tasks"]
    assert row["difference"] == pytest.approx(50 / 3) and row["high"] > row["difference"] > row["low"] > 1


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 1), (2, 2), (0, 6), (7, 2)])
def test_the_sign_test_counts_the_coins(gained: int, lost: int) -> None:
    heads = [sum(coins) for coins in product((0, 1), repeat=gained + lost)]
    apart = abs(gained - lost)
    assert sign_test(gained, lost) == pytest.approx(sum(abs(2 * h - gained - lost) >= apart for h in heads) / len(heads))


def test_other_problems_cannot_be_paired() -> None:
    before = model("a", t=task(1, 0, plan={"seed": 1, "samples": 4}))
    with pytest.raises(BadInput, match=r"task t: a and b were not asked the same problems \(2 and 3, 2 of them in both; .*: seed\)"):
        pair(before, model("b", t=task(1, 0, 1, plan={"seed": 2, "samples": 4})))
    shuffled = task(1, 0)
    shuffled["keys"].reverse()
    with pytest.raises(BadInput, match="the task itself has changed"):
        pair(model("a", t=task(1, 0)), model("b", t=shuffled))
    with pytest.raises(BadInput, match="no task in common"):
        pair(before, model("b", u=task(1)))


def test_settings_in_which_they_differ_are_told() -> None:
    found = pair(model("a", t=task(1, plan={"samples": 4, "plain": True})), model("b", t=task(1, plan={"samples": 8, "plain": True})))
    assert found["tasks"][0]["asked"] == ["samples"] and "t: asked otherwise (samples)." in tables.pair_text(found)


def test_each_against_the_first_or_against_the_one_before() -> None:
    models = [model(name, t=task(value)) for name, value in (("a", 1), ("b", 0), ("c", 1))]
    assert [(p["before"], p["after"]) for p in compare(models)["pairs"]] == [("a", "b"), ("a", "c")]
    assert [(p["before"], p["after"]) for p in compare(models, True)["pairs"]] == [("a", "b"), ("b", "c")]


def test_nobody_wins_by_the_choice_of_tasks() -> None:
    first = model("a", easy=task(1, 1), hard=task(0, 0), ppl=task(1.0, 2.0, better="lower", unit="nats"))
    second = model("b", easy=task(0.5, 0.5), hard=task(0.25, 0.25), ppl=task(1.0, 2.0, better="lower", unit="nats"))
    found = leave_one_out([first, second])
    assert found is not None and found["left_out"] == ["ppl"] and found["tasks"] == ["easy", "hard"]
    assert [(row["without"], row["means"], row["ranks"], row["changes"]) for row in found["rows"]] == [
        (None, [0.5, 0.375], [1, 2], False), ("easy", [0, 0.25], [2, 1], True), ("hard", [1, 0.5], [1, 2], False)
    ]  # fmt: skip
    assert "The ranking depends on easy." in tables.without_text(found) and "ppl" in tables.without_text(found)
    assert leave_one_out([model("a", t=task(1)), model("b", t=task(1))]) is None


def test_the_tables_hold_the_numbers() -> None:
    before, after = model("a", chain=task(1, 1, 0, 0)), model("b", chain=task(0, 1, 1, 1))
    before["tasks"]["chain"]["tokens"] = 77  # of what, only a task that asks for answers says
    lines = tables.text({"models": [before, after]}, compare([before, after])).splitlines()
    assert lines[0].startswith("a (") and "77" not in " ".join(lines) and any(line.split()[:2] == ["chain", "75.0%"] for line in lines)
    (row,) = [line.split() for line in lines if "+25.0" in line]
    assert row[:4] == ["chain", "50.0%", "75.0%", "+25.0"] and row[-5:] == ["2", "(50.0%)", "1", "(25.0%)", "1"]
