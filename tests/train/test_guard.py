"""The guard: what it calls a spike and what not, and a run that is poisoned, hit by a NaN, or too fast."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import trainee
from hypothesis import given, settings
from hypothesis import strategies as st
from trainee import Watched, loader, rows, trainer, weights

from pascaline.errors import BadInput
from pascaline.tables import Guard as Rule
from pascaline.train import checkpoint
from pascaline.train.guard import LEAST, Guard, limit

RULE = Rule()


def healthy(count: int, seed: int = 0) -> list[tuple[float, float]]:
    """Losses of two kinds of documents that take turns at random, and norms with a tail."""
    draw = random.Random(seed)
    return [(draw.gauss(3.0 if draw.random() < 0.12 else 1.2, 0.08), draw.lognormvariate(0, 0.3)) for _ in range(count)]


def fed(steps: list[tuple[float, float]], rule: Rule = RULE) -> tuple[Guard, list[str]]:
    guard, said = Guard(), []
    for loss, norm in steps:
        said.append(guard.judge(rule, loss, norm))
    return guard, said


# ---- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_health_is_left_alone(seed):
    """Also where most losses are alike and one in eight is much higher: two kinds of documents."""
    guard, said = fed(healthy(1000, seed))
    assert sum(map(bool, said)) <= 3 and not guard.drifted(RULE)


@pytest.mark.parametrize("loss, norm, reason", [(9.0, 1.0, "loss spike"), (1.2, 40.0, "gradient spike"), (math.nan, 1.0, "non-finite"),
                                                (1.2, math.inf, "non-finite"), (math.inf, 1.0, "non-finite")])  # fmt: skip
def test_each_spike_has_its_name_and_is_counted(loss, norm, reason):
    guard, _ = fed(healthy(200))
    smoothed, before = guard.smoothed, guard.counts.get(reason, 0)
    assert guard.judge(RULE, loss, norm) == reason and guard.counts[reason] == before + 1
    assert guard.smoothed == smoothed and all(map(math.isfinite, guard.losses + guard.norms))
    assert guard.judge(RULE, 1.2, 1.0) == "" and guard.in_row == 0


def test_a_window_that_is_short_says_nothing_but_non_finite():
    guard, _ = fed(healthy(LEAST - 1))
    assert guard.judge(RULE, 1e9, 1e9) == "" and guard.judge(RULE, 1.0, math.nan) == "non-finite"


def test_sigma_zero_only_sees_what_is_not_finite():
    guard, _ = fed(healthy(200))
    off = Rule(sigma=0.0, patience=0)
    assert guard.judge(off, 1e9, 1e9) == "" and guard.judge(off, math.nan, 1.0) == "non-finite"
    guard.above = 10**6
    assert not guard.drifted(off)


def test_a_new_level_is_no_spike_for_ever():
    """Another kind of data begins: a twentieth of the window later it is taken as it is."""
    _, said = fed([(random.Random(i).gauss(2, 0.1), 1.0) for i in range(200)] + [(6.0, 1.0)] * 30)
    assert said[200:] == ["loss spike"] * 7 + [""] * 23


@given(st.lists(st.floats(0.5, 3), min_size=LEAST, max_size=128), st.floats(1, 10))
@settings(max_examples=100, deadline=None)
def test_the_limit_lies_above_the_median_and_grows_with_sigma(window, sigma):
    assert limit(window, sigma) > np.median(window) and limit(window, sigma + 1) > limit(window, sigma)


def test_a_few_outliers_do_not_move_the_limit():
    window = [random.Random(i).gauss(2, 0.1) for i in range(128)]
    assert limit(window[:-5] + [1e6] * 5, 6.0) < 3.0
    normal = [random.Random(i).gauss(2, 0.1) for i in range(20_000)]
    assert limit(normal, 6.0) == pytest.approx(2 + 6 * 0.1, rel=0.02)  # the robust deviation is the deviation


def test_slow_drift():
    rule = Rule(margin=0.2, patience=20)
    falling = [(3 - 0.01 * i, 1.0) for i in range(150)]
    guard, _ = fed(falling, rule)
    assert guard.above == 0
    rising = [(1.5 + 0.012 * i, 1.0) for i in range(100)]
    assert any(guard.judge(rule, *step) or guard.drifted(rule) for step in rising[:80])
    assert rule.patience == guard.above and not any(guard.counts.values())
    assert rule.patience < guard.since_best < 80  # where the rise began
    guard.rewound(30)
    assert (guard.shift, guard.slower, guard.counts["rewind"]) == (30, 1.0, 1)
    guard.rewound(10)
    assert (guard.shift, guard.slower, guard.counts["rewind"]) == (40, 0.25, 2)


@pytest.mark.parametrize("count", [0, 3, 200])
def test_state_survives_json(count):
    guard, _ = fed(healthy(count))
    assert Guard.of(json.loads(json.dumps(guard.facts(), allow_nan=False))) == guard


# ---- in a run --------------------------------------------------------------------------------------------------------

STEPS = 160
QUICK = dict(lr=0.003, save_every=10, keep_last=6, schedule="constant", mtp=0.0, balance_rate=0.0)


def poison(*at: int):
    """Documents whose tokens follow no rule: their losses are far above the others'."""

    def act(step, batches):
        if step in at:
            for batch in batches:
                batch.tokens[:] = torch.randint(0, trainee.VOCAB, batch.tokens.shape, generator=torch.Generator().manual_seed(step))
        return batches

    return Watched(act)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    trainer(folder, **QUICK).run(loader(), STEPS, quiet=True)
    return folder


def final(folder) -> float:
    return float(np.mean([row["ce"] for row in rows(folder)[-10:]]))


def test_a_clean_run_is_not_touched(clean):
    assert not any("guard" in row for row in rows(clean)) and not (clean / "quarantine.jsonl").exists()


def test_a_poisoned_step_is_skipped_named_and_costs_nothing(clean, tmp_path, capsys):
    trainer(tmp_path, **QUICK).run(poison(120), STEPS)
    found = rows(tmp_path)
    assert [row["step"] for row in found if "guard" in row] == [120] and found[120]["skipped"]
    assert capsys.readouterr().err.count(f"step 120 skipped, {found[120]['guard']}") == 1
    assert final(tmp_path) == pytest.approx(final(clean), abs=0.01)
    (entry,) = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert (entry["step"], entry["reason"]) == (120, found[120]["guard"])
    step = {i["sample"] for names in loader().documents(120) for i in names.values()}
    assert {d["sample"] for d in entry["documents"]} <= step and entry["documents"][0]["loss"] > 2 * found[119]["ce"]
    losses = [d["loss"] for d in entry["documents"]]
    assert losses == sorted(losses, reverse=True)


def test_a_step_that_is_replayed_is_quarantined_once(tmp_path):
    source = poison(120)
    act = source.act

    def killed(step, batches):
        if step == 127:
            raise KeyboardInterrupt
        return act(step, batches)

    source.act = killed
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, **QUICK).run(source, STEPS, quiet=True)
    once = (tmp_path / "quarantine.jsonl").read_text()
    trainer(tmp_path, **QUICK).run(poison(120), STEPS, quiet=True)
    assert once.count("\n") == 1 and (tmp_path / "quarantine.jsonl").read_text() == once


def test_a_single_bad_document_is_the_first_suspect(tmp_path):
    one = trainer(tmp_path, guard=Rule(window=64, sigma=2.0), **QUICK)
    victim = loader().documents(120)[1][1, 0]

    def act(step, batches):
        if step == 120:
            inside = batches[1].document_ids[1] == 0
            batches[1].tokens[1, inside] = torch.arange(int(inside.sum())) * 7 % trainee.VOCAB
        return batches

    one.run(Watched(act), 121, quiet=True)
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == 120 and entries[-1]["documents"][0]["sample"] == victim["sample"]


@pytest.mark.parametrize("at", [2, 100])
def test_a_nan_in_a_gradient_is_skipped(at, clean, tmp_path):
    one = trainer(tmp_path, **QUICK)

    def act(step, batches):
        if step == at:  # once, in the backward of the first micro-batch
            hook = one.model.model.norm.weight.register_hook(lambda g: (hook.remove(), g * float("nan"))[1])
        return batches

    one.run(Watched(act), STEPS, quiet=True)
    assert [(row["step"], row["guard"]) for row in rows(tmp_path) if "guard" in row] == [(at, "non-finite")]
    assert final(tmp_path) == pytest.approx(final(clean), abs=0.01)


def diverging(folder, **changes):
    """From step 100 on the data is poisoned for 40 steps: a few are skipped, then it is a new level."""
    rule = Rule(patience=12, margin=0.3, **changes)
    return trainer(folder, guard=rule, **QUICK), poison(*range(100, 140))


def test_a_drift_is_rewound_and_its_data_left_out(clean, tmp_path, capsys):
    one, source = diverging(tmp_path)
    one.run(source, STEPS)
    err = capsys.readouterr().err
    assert 1 <= err.count("its data left out") <= 3 and "back to step" in err
    assert one.guard.counts["rewind"] >= 1 and one.guard.shift > 0
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(STEPS))
    assert found[-1]["ce"] < 1.5 * final(clean) + 0.1
    assert max(source.asked) == STEPS - 1 + one.guard.shift
    thrown_away = len(source.asked) - STEPS
    assert thrown_away > 0 and one.totals.tokens == sum(row["tokens"] for row in found)  # of the steps that stand
    assert one.spent.tokens > one.totals.tokens and one.spent.flops > one.totals.flops and one.spent.seconds > one.totals.seconds


def test_a_rewind_is_resumed_exactly(tmp_path):
    straight, source = diverging(tmp_path / "straight")
    straight.run(source, STEPS, quiet=True)

    class Crash(Exception):
        pass

    crashed = False
    for _ in range(3):
        one, source = diverging(tmp_path / "crashed")
        act = source.act

        def crash(step, batches, one=one, act=act):
            nonlocal crashed
            if not crashed and one.guard.counts.get("rewind"):
                crashed = True
                raise Crash
            return act(step, batches)

        source.act = crash
        try:
            one.run(source, STEPS, quiet=True)
            break
        except Crash:
            pass
    assert crashed and weights(tmp_path / "crashed") == weights(tmp_path / "straight")
    assert rows(tmp_path / "crashed") == rows(tmp_path / "straight")


def test_a_run_killed_just_before_it_rewinds_does_so_at_the_same_step(tmp_path):
    """Also where every step is saved: what has drifted is no checkpoint."""
    settings = {**QUICK, "save_every": 1, "keep_last": 60}
    rule = Rule(patience=12, margin=0.3)

    def run(name):
        one = trainer(tmp_path / name, guard=rule, **settings)
        return one, poison(*range(100, 140))

    straight, source = run("straight")
    rewind = straight._rewind

    def just_before(step, progress):
        if not (tmp_path / "killed").exists():  # what kill -9 would leave behind here, the last checkpoint written
            straight._saved(progress, must=False)
            shutil.copytree(tmp_path / "straight", tmp_path / "killed")
        return rewind(step, progress)

    straight._rewind = just_before
    straight.run(source, 150, quiet=True)
    assert straight.guard.counts["rewind"] >= 1 and (tmp_path / "killed").exists()
    again, source = run("killed")
    again.run(source, 150, quiet=True)
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight") and rows(tmp_path / "killed") == rows(tmp_path / "straight")


def test_rewinds_are_bounded_and_end_in_advice(tmp_path):
    one = trainer(tmp_path, guard=Rule(patience=10, margin=0.2, rewinds=1), **QUICK)
    with pytest.raises(BadInput, match=r"toy step \d+.*1 rewinds did not help.*toy\.lr") as caught:
        one.run(poison(*range(90, 1000)), STEPS, quiet=True)
    assert "\n" not in str(caught.value) and checkpoint.steps(tmp_path)
