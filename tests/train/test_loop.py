"""The loop: it learns, it resumes to the bit from anywhere, and what cannot go on is said in one sentence."""

import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import forked  # noqa: F401 (its fork server has torch loaded)
import numpy as np
import pytest
import torch
import trainee
from safetensors import SafetensorError
from safetensors.torch import load_file
from trainee import Watched, loader, model, rows, trainer, weights

from pascaline.data.batch import Sample, batches
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.runs import Metrics, disk_full
from pascaline.stopping import Interrupt, Stopped
from pascaline.tables import Guard
from pascaline.train import checkpoint, loop
from pascaline.train.loop import Trainer, active_parameters
from pascaline.train.losses import Loss

STEPS = 12
KINDS = [
    dict(),
    dict(optimizer="muon", schedule="cosine"),
    dict(dtype=torch.bfloat16),
    dict(dtype=torch.bfloat16, optimizer="muon"),
    dict(shape=dict(num_nextn_predict_layers=0, tie_word_embeddings=True), mtp=0.0),
]


class Crash(Exception):
    pass


def crash_at(*steps: int) -> Watched:
    def act(step, _):
        if step in steps:
            raise Crash

    return Watched(act)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    trainer(folder).run(loader(), STEPS, quiet=True)
    return folder


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_count(kind, tmp_path):
    trainer(tmp_path, **{"lr": 0.03, "warmup": 5, **kind}).run(loader(), 60, quiet=True)
    found = rows(tmp_path)
    assert found[0]["ce"] == pytest.approx(math.log(trainee.VOCAB), rel=0.1) and found[-1]["ce"] < 0.5
    learnt = hf.load(tmp_path / "model")
    tokens = torch.arange(3, 13)[None] % trainee.VOCAB
    assert learnt(tokens)[0].argmax(-1).tolist() == [(t + 1) % trainee.VOCAB for t in range(3, 13)]
    if learnt.config.num_nextn_predict_layers:
        assert found[-1]["mtp"] < 0.5 * found[0]["mtp"]
        ((states, _),) = learnt.mtp_hidden(learnt.hidden(tokens)[0], tokens)
        assert learnt.head(states)[0, :-1].argmax(-1).tolist() == [(t + 2) % trainee.VOCAB for t in range(3, 12)]


def test_metrics_have_a_row_a_step(straight):
    found = rows(straight)
    assert [row["step"] for row in found] == list(range(STEPS))
    for row in found:
        assert row["loss"] == pytest.approx(row["ce"] + row["mtp"]) and row["grad_norm"] > 0
        assert row["lr"] <= 0.01 and 0 < row["tokens"] <= 96
        assert len(row["expert_load"]) == 2  # the layer with experts, and the MTP module
        for layer in row["expert_load"]:
            assert len(layer) == 4 and sum(layer) == pytest.approx(1, abs=1e-3)
        assert row["max_violation"] == pytest.approx(max(4 * s for layer in row["expert_load"] for s in layer) - 1, abs=1e-3)
    timed = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert all(row["tokens_per_s"] > 0 for row in timed)
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(timed))


def test_totals(straight, tmp_path):
    one = trainer(tmp_path)
    found = one.run(loader(), STEPS, quiet=True)
    assert found.tokens == sum(row["tokens"] for row in rows(tmp_path))
    assert found.flops == pytest.approx(6 * active_parameters(one.model) * found.tokens) and found.seconds > 0


def test_the_share_of_the_peak_is_logged_where_the_peak_is_known(straight, tmp_path):
    assert all("gemm_share" not in row for row in rows(straight))
    one = trainer(tmp_path)
    one.peak = 1e9
    one.run(loader(), 3, quiet=True)
    for row in rows(tmp_path):
        row |= json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[row["step"]])
        assert row["gemm_share"] == pytest.approx(6 * active_parameters(one.model) * row["tokens_per_s"] / 1e9) and "mfu" not in row


def test_active_parameters_by_hand():
    untied, tied = model(num_nextn_predict_layers=0), model(num_nextn_predict_layers=0, tie_word_embeddings=True)
    expert = 3 * 8 * 16
    whole = sum(p.numel() for p in untied.parameters())
    assert active_parameters(untied) == whole - 2 * expert - trainee.VOCAB * 16  # 2 of 4 experts rest; the lookup is no matmul
    assert active_parameters(tied) == active_parameters(untied)


def test_the_saved_model_is_the_float32_masters(tmp_path):
    one = trainer(tmp_path, dtype=torch.bfloat16)
    one.run(loader(), STEPS, quiet=True)
    saved = hf.load(tmp_path / "model").state_dict()
    masters = one.optimizer.masters
    assert all(torch.equal(saved[name], master) for name, master in masters.items())
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters.values())


def test_a_source_sees_the_weights_of_the_step_before(tmp_path):
    """What makes rollouts on-policy: the source is asked after the update, never ahead of it."""
    one = trainer(tmp_path)
    seen = []

    class Looking:
        facts = loader().facts

        def step(self, step):
            seen.append(one.model.model.norm.weight.detach().clone())
            return loader().step(step)

    one.run(Looking(), STEPS, quiet=True)
    assert len(seen) == STEPS and all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


# ---- balance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_router_biases_move_only_when_balanced(rate, tmp_path):
    one = trainer(tmp_path, balance_rate=rate)
    one.run(loader(), 5, quiet=True)
    biases = [r.e_score_correction_bias for r in one.routers]
    assert len(biases) == 2
    for bias in biases:
        assert bool(bias.any()) == (rate > 0) and bias.abs().max() <= 5 * 2 * rate


def test_one_balance_step_counts_the_whole_optimizer_step(tmp_path, monkeypatch):
    """All micro-batches together, once."""
    calls = []
    one = trainer(tmp_path)
    for router in one.routers:
        monkeypatch.setattr(router, "balance", lambda load, rate, fine: calls.append((load.tolist(), rate)))
    one.run(loader(), 1, quiet=True)
    assert len(calls) == 2 and {rate for _, rate in calls} == {0.01}
    real = 2 * rows(tmp_path)[0]["tokens"]
    assert all(real <= sum(load) <= 4 * 24 * 2 for load, _ in calls) and real > 2 * 24 * 2  # more than one micro-batch holds


def test_balancing_evens_the_load(tmp_path):
    """A router that starts far off is brought back; without balancing it stays off."""

    def last_violation(folder, rate):
        one = trainer(folder, balance_rate=rate, lr=1e-4)
        with torch.no_grad():
            for router in one.routers:
                router.e_score_correction_bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        one.run(loader(), 40, quiet=True)
        return rows(folder)[-1]["max_violation"]

    assert last_violation(tmp_path / "off", 0.0) > 0.9 > 0.6 > last_violation(tmp_path / "on", 0.05)


class Rollouts:
    """Answers that count upwards in twos, as a source of rl; good and bad ones alike."""

    facts: dict[str, float] = {"reward": 0.5}  # noqa: RUF012

    def step(self, step):
        draw, ones, samples = np.random.default_rng(step), np.ones(8, np.float32), []
        for i in range(6):
            tokens = (draw.integers(trainee.VOCAB) + 2 * np.arange(8)) % trainee.VOCAB
            samples.append(Sample(tokens, {"rl": ones, "advantage": (-1) ** i * ones, "old_logprob": -3 * ones}))
        return batches(samples, 24, 2, 0)


def test_policy_gradient_on_a_model_with_mtp_modules(tmp_path):
    """Without their loss the MTP modules are left alone; balancing the other routers must still work."""
    one = Trainer(model(), trainee.stage(), Loss(), tmp_path, "rl", torch.float32)
    one.run(Rollouts(), 4, quiet=True)
    found = rows(tmp_path)
    assert len(found) == 4 and found[0]["reward"] == 0.5 and {"rl", "entropy", "mismatch", "clipped"} <= set(found[0])
    assert one.routers[0].e_score_correction_bias.any() and not one.routers[1].e_score_correction_bias.any()


@pytest.mark.parametrize("kind", [dict(), dict(optimizer="muon", qk_clip=0.1)])
def test_mtp_modules_that_learn_apart_follow_the_policy_and_change_nothing_of_it(kind, tmp_path):
    """Bit for bit, although every step is clipped."""

    def trained(folder: Path, rule: Loss) -> dict[str, torch.Tensor]:
        Trainer(model(), trainee.stage(clip=1e-2, lr=0.02, **kind), rule, folder, "rl", torch.float32).run(Rollouts(), 30, quiet=True)
        return hf.load(folder / "model").state_dict()

    alone, both = trained(tmp_path / "alone", Loss()), trained(tmp_path / "both", Loss(mtp=0.3, mtp_apart=True))
    for name, tensor in alone.items():
        assert torch.equal(tensor, both[name]) != name.startswith("model.layers.2."), name
    found = rows(tmp_path / "both")
    assert found[-1]["mtp"] < 0.7 * found[0]["mtp"] and len(found[0]["expert_load"]) == 2
    for row, without in zip(found, rows(tmp_path / "alone"), strict=True):
        assert row["loss"] == pytest.approx(row["rl"] + row["mtp"]) and row["grad_norm"] == without["grad_norm"] > 1e-2


# ---- ahead of the host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict(), dict(optimizer="muon", qk_clip=0.1, activation_checkpointing=True)])
def test_a_step_does_not_wait_for_the_device(kind, tmp_path, monkeypatch):
    """The meta device has no numbers: whoever asks it for one fails."""
    monkeypatch.setattr(loop, "_to_host", lambda flat: (flat, None))
    table = trainee.stage(**kind)
    one = Trainer(model().to("meta"), table, Loss(mtp=0.3, balance=0.1, z=0.1), tmp_path, "toy", torch.bfloat16)
    assert one.lag == 1
    updates = []
    one.optimizer.adamw.step = lambda: updates.append(one.optimizer.adamw.found_inf)  # its fused kernel knows no meta device
    one.guard.losses = one.guard.norms = [1.0 + 0.01 * i for i in range(100)]
    for step in range(3):
        one._launch(loader(), step, STEPS, Interrupt())
    assert len(one.launched) == len(updates) == 3 and {"ce", "mtp", "loss", "grad_norm", "load"} <= set(one.launched[0].names)
    with pytest.raises(RuntimeError):  # the check can fail
        one.launched[0].values.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", [dict(), dict(optimizer="muon", qk_clip=0.1)])
def test_cuda_is_not_waited_for(kind, tmp_path):
    """PyTorch itself says where the host would wait; the first steps may, while kernels and constants are made."""
    one = Trainer(model().to("cuda"), trainee.stage(**kind), Loss(mtp=0.3), tmp_path, "toy", torch.bfloat16)
    for step in range(2):
        one._launch(loader(), step, STEPS, Interrupt())
    torch.cuda.set_sync_debug_mode("error")
    try:
        one._launch(loader(), 2, STEPS, Interrupt())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_ahead_of_the_host_is_the_same_run(kind, tmp_path):
    """As on an accelerator, with a step that is no number in it, a crash, and the same bits in the end."""

    def hurt(one, crash):
        def act(step, found):
            if step == 7:
                found[0].streams["ce"][0, 1] = float("nan")
            if step == 10 and crash:
                raise Crash
            return found

        return Watched(act)

    ends = []
    for name, lag, crash in (("at once", 0, False), ("ahead", 1, False), ("crashed", 1, True)):
        for crashing in [True, False] if crash else [False]:
            one = trainer(tmp_path / name, **kind)
            one.lag = lag
            try:
                one.run(hurt(one, crashing), STEPS, quiet=True)
            except Crash:
                continue
        ends.append((weights(tmp_path / name), rows(tmp_path / name), (tmp_path / name / "quarantine.jsonl").read_text()))
    assert [row["step"] for row in ends[0][1] if "guard" in row] == [7]
    assert ends[1][:2] == ends[0][:2] and ends[2][:2] == ends[0][:2]


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_crashed_run_ends_with_the_same_bits(kind, tmp_path):
    """Crash before the first checkpoint, right after one, and between two; each time a new trainer goes on."""
    trainer(tmp_path / "straight", **kind).run(loader(), STEPS, quiet=True)
    folder = tmp_path / "crashed"
    # After the first checkpoint the initial weights must not matter: other seeds.
    for at, seed in ((1, 1), (4, 1), (6, 7), (11, 8)):
        with pytest.raises(Crash):
            trainer(folder, seed, **kind).run(crash_at(at), STEPS, quiet=True)
        assert not (folder / "model").exists()
    last = crash_at()
    trainer(folder, 9, **kind).run(last, STEPS, quiet=True)
    assert last.asked == [9, 10, 11]
    assert weights(folder) == weights(tmp_path / "straight")
    assert rows(folder) == rows(tmp_path / "straight")


@pytest.mark.parametrize("at", [1, 2, 3, 5, 11])
def test_a_crash_anywhere(at, straight, tmp_path):
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(at), STEPS, quiet=True)
    trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert weights(tmp_path) == weights(straight) and rows(tmp_path) == rows(straight)


def test_totals_go_on_over_resumes(straight, tmp_path):
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(7), STEPS, quiet=True)
    found = trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert found.tokens == sum(row["tokens"] for row in rows(straight)) and found.flops > 0


def test_the_global_random_numbers_go_on(tmp_path):
    """Whoever draws from torch's generator in a step (dropout, a sampler) draws the same after a resume."""

    def draw(step, batches):
        for batch in batches:
            batch.streams["ce"] = batch.streams["ce"] * torch.rand(batch.tokens.shape)
        return batches

    def draw_then_crash(step, batches):
        if step == 7:
            raise Crash
        return draw(step, batches)

    torch.manual_seed(3)
    trainer(tmp_path / "straight").run(Watched(draw), STEPS, quiet=True)
    torch.manual_seed(3)
    with pytest.raises(Crash):
        trainer(tmp_path / "crashed").run(Watched(draw_then_crash), STEPS, quiet=True)
    torch.manual_seed(99)
    trainer(tmp_path / "crashed").run(Watched(draw), STEPS, quiet=True)
    assert weights(tmp_path / "crashed") == weights(tmp_path / "straight")


def test_a_finished_run_does_nothing_more(straight, tmp_path):
    one = trainer(tmp_path)
    one.run(loader(), STEPS, quiet=True)
    before = (weights(tmp_path), (tmp_path / "metrics.jsonl").read_bytes())
    again = crash_at()
    trainer(tmp_path, 5).run(again, STEPS, quiet=True)
    assert again.asked == [] and (weights(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()) == before


@pytest.mark.parametrize("last, every, kept", [(1, 0, {12}), (2, 0, {9, 12}), (1, 6, {6, 12}), (2, 4, {9, 12}), (9, 0, {3, 6, 9, 12})])
def test_which_checkpoints_are_kept(last, every, kept, straight, tmp_path):
    trainer(tmp_path, keep_last=last, keep_every=every).run(loader(), STEPS, quiet=True)
    assert {p.name for p in (tmp_path / "state").iterdir()} == {f"step-{s}" for s in kept}
    inside = {p.name for p in (straight / "state" / f"step-{STEPS}").iterdir()}
    assert inside == {"state.json", trainee.tensors_file(straight, STEPS).name}


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """kill -9, twenty times, in training and in the middle of checkpoints; the last run goes to the end."""
    steps = 90
    context = multiprocessing.get_context("forkserver")

    def child(folder: Path):
        process = context.Process(target=trainee.run_to_the_end, args=(str(folder), steps, 2))
        process.start()
        return process

    def written(folder: Path) -> int:
        path = folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    undisturbed = child(tmp_path / "straight")
    draw = random.Random(4)
    killed, kills = tmp_path / "killed", 0
    saving = 0
    for turn in range(20):
        process = child(killed)
        goal = draw.randint(4 * turn + 1, 4 * turn + 4)
        while written(killed) < goal and process.is_alive():
            time.sleep(0.0005)
        if turn % 2:
            time.sleep(draw.uniform(0, 0.01))
        while not turn % 2 and process.is_alive() and not any((killed / "state").glob(".step-*.tmp")):
            pass  # in the middle of a checkpoint
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL  # a starved parent may come too late
        saving += any((killed / "state").glob(".step-*.tmp"))
    assert kills >= 16 and saving >= 1
    for process in (child(killed), undisturbed):
        process.join(60)
        assert process.exitcode == 0
    assert weights(killed) == weights(tmp_path / "straight")
    assert rows(killed) == rows(tmp_path / "straight") and len(rows(killed)) == steps


def test_training_goes_on_while_a_checkpoint_is_written(straight, tmp_path, monkeypatch):
    """What is written is the state as it was, however long that takes and whatever has changed since."""
    real, writing = checkpoint.dcp.save, []
    one = trainer(tmp_path, save_every=2, keep_last=9)

    def slow(*arguments, **options):
        writing.append(1)
        while len(source.asked) < min(2 * len(writing) + 2, STEPS):  # the step before the next save has begun
            time.sleep(0.001)
        real(*arguments, **options)

    source = Watched(lambda *_: None)
    monkeypatch.setattr(checkpoint.dcp, "save", slow)
    one.run(source, STEPS, quiet=True)
    monkeypatch.undo()
    assert len(writing) == STEPS // 2 and weights(tmp_path) == weights(straight)
    told = [json.loads((tmp_path / "state" / f"step-{step}" / "state.json").read_text())["totals"]["tokens"] for step in (2, 4)]
    assert told == [sum(row["tokens"] for row in rows(straight)[:step]) for step in (2, 4)]
    shutil.rmtree(tmp_path / "model")
    checkpoint.forget_after(tmp_path, 4)
    trainer(tmp_path, 3).run(loader(), STEPS, quiet=True)
    assert weights(tmp_path) == weights(straight)


def test_a_write_that_fails_for_another_reason_ends_the_run(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise PermissionError(13, "Permission denied", "state")

    monkeypatch.setattr(checkpoint.dcp, "save", broken)
    with pytest.raises(PermissionError):
        trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert not (tmp_path / "model").exists() and checkpoint.steps(tmp_path) == []


# ---- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_stops(number, straight, tmp_path):
    before = signal.getsignal(number)
    source = Watched(lambda step, _: os.kill(os.getpid(), number) if step == 4 else None)
    with pytest.raises(Stopped, match="step 5 of 12"):
        trainer(tmp_path).run(source, STEPS, quiet=True)
    assert signal.getsignal(number) == before
    assert checkpoint.steps(tmp_path) == [3, 5] and len(rows(tmp_path)) == 5
    assert not (tmp_path / "model").exists()
    trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert weights(tmp_path) == weights(straight) and rows(tmp_path) == rows(straight)


def test_a_signal_in_the_last_step_finishes(straight, tmp_path):
    trainer(tmp_path).run(Watched(lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if step == 11 else None), STEPS, quiet=True)
    assert weights(tmp_path) == weights(straight)


# ---- what cannot go on -----------------------------------------------------------------------------------------------


def spoil(value: float, at: int):
    def act(step, found):
        if step == at:
            found[0].streams["ce"][0, 1] = value
        return found

    return Watched(act)


def bad_from(value: float, at: int):
    def act(step, found):
        if step >= at:
            found[0].streams["ce"][0, 1] = value
        return found

    return Watched(act)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_a_loss_that_stays_not_finite_stops_with_the_weights_as_they_were(value, straight, tmp_path):
    one = trainer(tmp_path, guard=Guard(max_skips=1))
    kept = {}
    source = spoil(value, 5)
    act = source.act
    source.act = lambda step, found: (kept.update({n: p.detach().clone() for n, p in one.model.state_dict().items()}), act(step, found))[1]
    if value == 1e38:  # finite, but its sum over the step is not
        source.act = lambda step, found: [_overflow(b) for b in found] if step == 5 else found
        kept = None
    with pytest.raises(BadInput, match=r"toy step 5.*toy\.lr") as caught:
        one.run(source, STEPS, quiet=True)
    assert "\n" not in str(caught.value)
    if kept is not None:
        assert all(torch.equal(t, kept[n]) for n, t in one.model.state_dict().items())
    assert len(rows(tmp_path)) == 5 and [p.name for p in (tmp_path / "state").iterdir()] == ["step-3"]
    assert not (tmp_path / "model").exists()
    trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert weights(tmp_path) == weights(straight)


def _overflow(batch):
    batch.streams["ce"] = torch.full_like(batch.streams["ce"], 1e38) * torch.sign(torch.arange(24) % 2 - 0.5)
    return batch


def test_weights_that_are_not_finite_stop(tmp_path):
    one = trainer(tmp_path)
    with torch.no_grad():
        one.model.model.embed_tokens.weight[3, 2] = float("nan")
    with pytest.raises(BadInput, match=r"toy step 9.*10th time in a row"):
        one.run(loader(), STEPS, quiet=True)


def test_a_step_without_any_weight_is_refused(tmp_path):
    def act(step, found):
        for batch in found:
            batch.streams["ce"].mul_(step != 2)
        return found

    with pytest.raises(BadInput, match=r"toy step 2.*weight"):
        trainer(tmp_path).run(Watched(act), STEPS, quiet=True)


def test_a_step_without_batches_is_skipped_and_said(tmp_path):
    """A rollout in which all groups agree: nothing to learn, and not an error."""

    class Sometimes:
        facts = loader().facts

        def step(self, step):
            before.append(one.model.model.norm.weight.detach().clone())
            return [] if step in (1, 3) else loader().step(step)

    one = trainer(tmp_path)
    before = []
    one.run(Sometimes(), 4, quiet=True)
    found = rows(tmp_path)
    assert found[1] == {"step": 1, "tokens": 0, "loss": 0.0, "skipped": True} and "skipped" not in found[2]
    assert not torch.equal(before[0], before[1]) and torch.equal(before[1], before[2]) and not torch.equal(before[2], before[3])


@pytest.mark.parametrize(
    "name, content",
    [("state.json", b""), ("state.json", b"{"), ("state.json", b"\xff\xfe"), ("state.json", b"[]"), ("state.json", b"{}"),
     ("tensors", b""), ("tensors", 100), ("tensors", -1), ("tensors", None)],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(name, content, tmp_path):
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(4), STEPS, quiet=True)
    path = tmp_path / "state" / "step-3" / name if "." in name else trainee.tensors_file(tmp_path, 3)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(BadInput, match=r"step-3.*damaged") as caught:
        trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert "--fresh" in str(caught.value) and len(rows(tmp_path)) == 4  # nothing was thrown away


@pytest.mark.parametrize("name, content", [("state.json", b"{"), ("tensors", -1), ("tensors", "bit")])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(name, content, straight, tmp_path, capsys):
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(8), STEPS, quiet=True)
    path = tmp_path / "state" / "step-6" / name if "." in name else trainee.tensors_file(tmp_path, 6)
    data = bytearray(path.read_bytes())
    data[-5] ^= content == "bit"
    path.write_bytes(data if content == "bit" else data[:content] if isinstance(content, int) else content)
    trainer(tmp_path, 5).run(loader(), STEPS)
    err = capsys.readouterr().err
    assert err.count("step-6 is damaged") == 1 and "going on from step-3" in err
    assert weights(tmp_path) == weights(straight) and rows(tmp_path) == rows(straight)


def test_left_overs_of_a_killed_save_are_ignored_and_swept(straight, tmp_path):
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(4), STEPS, quiet=True)
    for name in (".step-6.tmp", "step-9"):  # a folder being written; one that never got its state.json
        (tmp_path / "state" / name).mkdir()
        (tmp_path / "state" / name / "tensors.safetensors").write_bytes(b"half")
    trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert weights(tmp_path) == weights(straight) and {p.name for p in (tmp_path / "state").iterdir()} == {"step-9", "step-12"}


@pytest.mark.parametrize("error", [SafetensorError("No space left on device (os error 28)"), OSError(28, "No space left on device")])
def test_a_full_disk_keeps_the_old_checkpoint(error, straight, tmp_path, monkeypatch, capsys):
    real, saves = checkpoint.dcp.save, []

    def full(*arguments, **options):
        saves.append(1)
        if len(saves) == 2:
            raise error
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(8), STEPS)
    assert "no checkpoint at step 6, the disk is full; going on" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path) == [3] and len(rows(tmp_path)) == 8  # it went on after step 6
    saves[1:] = []
    with pytest.raises(type(error)) as caught:  # the last one must be written
        trainer(tmp_path).run(loader(), 6, quiet=True)
    assert disk_full(caught.value) and [p.name for p in (tmp_path / "state").iterdir()] == ["step-3"]
    monkeypatch.undo()
    trainer(tmp_path).run(loader(), STEPS, quiet=True)
    assert weights(tmp_path) == weights(straight)


def test_metrics_wait_for_room_on_a_full_disk(straight, tmp_path, monkeypatch, capsys):
    real = Metrics.append

    def append(self, row):
        if 4 <= len(asked) <= 7:
            raise OSError(28, "No space left on device")
        real(self, row)

    source = Watched(lambda step, _: None)
    asked = source.asked
    monkeypatch.setattr(Metrics, "append", append)
    trainer(tmp_path).run(source, STEPS)
    assert rows(tmp_path) == rows(straight) and weights(tmp_path) == weights(straight)
    err = capsys.readouterr().err
    assert err.count("the disk is full; going on, metrics.jsonl") == 1 and err.count("no checkpoint at step 6") == 1


def test_a_checkpoint_holds_tensors_and_json_only(straight):
    """Nothing executable is loaded: law 6."""
    seen = set()

    def room(names):
        seen.update(names)
        return {}

    facts = checkpoint.load(straight, [STEPS], room, pytest.fail)
    assert facts["step"] == STEPS and facts["totals"]["tokens"] > 0
    assert any(n.endswith("e_score_correction_bias") for n in seen) and "rng" not in seen
    names = set(load_file(trainee.tensors_file(straight, STEPS)))
    assert {n.split(".")[0] for n in names} == {"master", "exp_avg", "exp_avg_sq", "step", "buffer", "rng"}
    assert list(facts["sha256"]) == [trainee.tensors_file(straight, STEPS).name]


def test_metrics_of_steps_after_the_checkpoint_are_dropped(straight, tmp_path):
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(5), STEPS, quiet=True)
    assert len(rows(tmp_path)) == 5
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # torn by the kill
    with pytest.raises(Crash):
        trainer(tmp_path).run(crash_at(3), STEPS, quiet=True)
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
