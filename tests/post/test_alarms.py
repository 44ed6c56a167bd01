"""The alarms of reinforcement: each fires on what it is for, none on a run in good health, and a resumed run hears the same."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pascaline.errors import BadInput
from pascaline.post import chain
from pascaline.post.alarms import GAP, Alarms, firing
from pascaline.recipe import load
from pascaline.runs import complete, write_json
from pascaline.tables import Alarms as Table
from pascaline.tables import Rl

TINY = Path(__file__).parent.parent.parent / "recipes" / "tiny.toml"
STEPS = 200


def rl(**alarms: Any) -> Rl:
    return Rl(max_tokens=200, alarms=Table(**alarms))


def healthy(steps: int = STEPS, seed: int = 0) -> list[dict[str, Any]]:
    """Rewards rise, entropy falls slowly, answers get longer as they get better, some groups are flat, a few answers are cut off."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(steps):
        done = step / steps
        skill = 0.2 + 0.6 * (1 - np.exp(-3 * done))
        row = {
            "entropy": 0.6 * np.exp(-1.2 * done) + rng.normal(0, 0.03),
            "response_tokens": 60 + 60 * done + rng.normal(0, 4),
            "truncated": abs(rng.normal(0.04, 0.03)),
            "none_right": 0.4 * (1 - skill),
            "all_right": 0.5 * skill * done,
            "unjudged": 0.0 if rng.random() < 0.9 else 1 / 128,
            "gap_max": abs(rng.normal(0, 1e-5)),
        }
        row["flat_groups"] = row["none_right"] + row["all_right"]
        found.append({name: float(value) for name, value in row.items()} | {"step": step, "rollout_tokens": 5000, "reward": float(skill)})
    return found


def changed(begin: int, **values: Any) -> list[dict[str, Any]]:
    """The healthy run, in which from `begin` on something is otherwise: a number, or a function of the steps since then."""
    return [
        row if row["step"] < begin else row | {k: v(row["step"] - begin) if callable(v) else v for k, v in values.items()}
        for row in healthy()
    ]


TROUBLE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "entropy": (changed(60, entropy=lambda n: 0.4 * 0.8**n), "collapsed to 0.0"),
    "length": (changed(60, response_tokens=lambda n: min(90 + 2.0 * n, 199.0)), "have grown to 1[89]. of 200 tokens"),
    "cut off": (changed(60, truncated=lambda n: min(0.02 * n, 0.7)), "of the answers are cut off at 200 tokens"),
    "none right": (changed(60, flat_groups=1.0, none_right=1.0, all_right=0.0), "not one answer was right in 10 steps"),
    "all right": (changed(60, flat_groups=1.0, none_right=0.0, all_right=1.0), "every answer was right in 10 steps"),
    "flat": (changed(60, flat_groups=1.0, none_right=0.5, all_right=0.5), "no group had a right and a wrong answer"),
    "unjudged": (changed(60, unjudged=0.05), "could not be judged in 10 steps"),
    "gap": (changed(60, gap_max=lambda n: 1e-5 * 2.0**n), "from the engine's, more than 0.0001"),
}
NAMES = {"cut off": "length", "none right": "flat", "all right": "flat"}


def heard(alarms: Alarms, rows: list[dict[str, Any]]) -> list[tuple[list[str], list[str], str]]:
    return [alarms.look(row) for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_hears_nothing(seed: int) -> None:
    assert {tuple(names) for names, *_ in heard(Alarms("rl", rl()), healthy(seed=seed))} == {()}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_each_alarm_is_told_once_with_advice(trouble: str) -> None:
    series, said = TROUBLE[trouble]
    found = heard(Alarms("rl", rl()), series)
    name = NAMES.get(trouble, trouble)
    first = next(step for step, (names, _, _) in enumerate(found) if names)
    assert 60 <= first <= 150 and {name} == {n for names, *_ in found for n in names}
    notes = [note for _, notes, _ in found for note in notes]
    assert len(notes) == 1 and found[first][1] == notes and not any(stop for *_, stop in found)
    assert re.search(said, notes[0]) and (trouble == "gap" or "rl." in notes[0] or "problems" in notes[0])


def test_the_limits_are_the_recipes() -> None:
    for trouble, keys in {
        "entropy": {"entropy": 0.0},
        "length": {"length": 1.0},
        "cut off": {"truncated": 1.0},
        "flat": {"flat": 0},
        "unjudged": {"unjudged": 0.06},
        "gap": {"gap": 1e60},
    }.items():
        assert not any(names for names, *_ in heard(Alarms("rl", rl(**keys)), TROUBLE[trouble][0])), trouble
    assert heard(Alarms("rl", rl(unjudged=0.0)), healthy())[-1][0] == ["unjudged"]
    in_bfloat16 = Alarms("rl", rl(), exact=False)
    assert Alarms("rl", rl()).gap == GAP < in_bfloat16.gap


def test_older_samples_and_refilled_groups_are_no_trouble() -> None:
    """The trainer may be away from the policy that sampled, once it has learnt from the samples; and refills teach where the first draw
    does not."""
    assert not firing([*healthy(30), {"gap_max": 0.3, "rollout_tokens": 0}], "rl", rl(), GAP)
    assert firing([*healthy(30), {"gap_max": 0.3, "rollout_tokens": 9}], "rl", rl(), GAP)
    flat = {"flat_groups": 1.0, "none_right": 1.0, "all_right": 0.0}
    assert not firing([flat | {"refilled": 2}] * 20, "rl", rl(), GAP) and firing([flat | {"refilled": 0}] * 20, "rl", rl(), GAP)


def test_a_rollout_counts_once_whatever_its_optimizer_steps() -> None:
    first, other = {"flat_groups": 1.0, "none_right": 1.0, "all_right": 0.0}, {"rollout": 1}
    keys = rl().model_copy(update={"minibatches": 2, "epochs": 2})
    assert firing([first, other, other, other] * 10, "rl", keys, GAP).keys() == {"flat"}
    assert not firing([first, other, other, other] * 9, "rl", keys, GAP)


def test_rows_without_numbers_say_nothing() -> None:
    """A step without a signal has no entropy; what is not finite is null in the file."""
    assert heard(Alarms("rl", rl()), [{}, {"entropy": None, "gap_max": None, "unjudged": float("nan")}] * 30)[-1] == ([], [], "")


@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_resumed_run_hears_the_same(trouble: str) -> None:
    """From the rows alone, as they come back from the file."""
    series, _ = TROUBLE[trouble]
    straight = heard(Alarms("rl", rl()), series)
    for at in (1, 12, 65, 75, 150):
        stored = [row | {"alarms": names} if names else row for row, (names, *_) in zip(series[:at], straight, strict=False)]
        resumed = Alarms("rl", rl())
        resumed.begin(json.loads(json.dumps(stored)))
        assert heard(resumed, series[at:]) == straight[at:]


@pytest.mark.parametrize("stop", [True, ["gap", "unjudged"]])
def test_stop_names_the_alarm_and_the_way_on(stop: Any) -> None:
    found = heard(Alarms("rl-all", rl(stop=stop)), TROUBLE["unjudged"][0])
    first = next(i for i, (names, *_) in enumerate(found) if names)
    assert not any(end for *_, end in found[:first]) and found[first][1] == []  # said once, as what ended the run
    assert "could not be judged" in found[first][2] and "--set rl-all.alarms.stop=false" in found[first][2]
    assert not any(end for *_, end in heard(Alarms("rl", rl(stop=["entropy"])), TROUBLE["unjudged"][0]))


def test_a_wrong_name_is_an_error_of_the_recipe() -> None:
    assert load(TINY, {"rl.alarms.stop": ["gap"]}).rl.alarms.stop == ["gap"] and load(TINY, {"rl.alarms.stop": True}).rl.alarms.stop is True
    with pytest.raises(BadInput, match=r"rl\.alarms\.stop"):
        load(TINY, {"rl.alarms.stop": ["gape"]})
    with pytest.raises(BadInput, match=r"rl\.alarms\.windw"):
        load(TINY, {"rl.alarms.windw": 3})


def test_a_run_goes_on_with_other_alarms_but_not_as_another_run(tmp_path: Path) -> None:
    write_json(tmp_path / "recipe.json", load(TINY, {"rl.alarms.stop": True}).model_dump(mode="json"))
    complete(tmp_path / "01-corpus")
    asked = load(TINY, {"rl.alarms.stop": False, "rl.alarms.length": 0.5})
    kept = chain._settle(asked, tmp_path)
    assert kept.rl.alarms == asked.rl.alarms and kept.rl.steps == asked.rl.steps
    with pytest.raises(BadInput, match=r"different: rl\.steps\)"):
        chain._settle(load(TINY, {"rl.alarms.length": 0.5, "rl.steps": 99}), tmp_path)
