"""Several optimizer steps from one rollout: what each of them sees, and that a run goes on in the middle of one with the same bits."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from tiny import CLOCK, tiny_model, with_routes

from pascaline.data.batch import Batch, Sample, batches
from pascaline.errors import BadInput
from pascaline.model.transformer import Model
from pascaline.post import grpo
from pascaline.post.minibatches import Minibatches, documents, stored
from pascaline.post.moment import Moment
from pascaline.post.rl import rl
from pascaline.post.stage import Run
from pascaline.recipe import load
from pascaline.tables import Rl
from pascaline.train import checkpoint
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss, compute, totals
from pascaline.train.policy import Policy

COIN = Path(__file__).parent.parent / "coin.toml"
ROW, MANY = 24, 10


class Fake:
    """Rollouts that depend on their number and the weights of the moment, as real ones do: MANY answers of 2 to 9 tokens."""

    def __init__(self, model: Model, most: int = MANY, record: bool = False):
        self.model, self.most, self.record, self.asked, self.facts = model, most, record, list[int](), dict[str, Any]()

    def step(self, step: int) -> list[Batch]:
        self.asked.append(step)
        draw, samples = np.random.default_rng(step), []
        moment = float(self.model.model.embed_tokens.weight.detach().double().sum())
        for i in range(self.most):
            tokens = draw.integers(61, size=3 + i % 8)
            ones = np.ones(len(tokens), np.float32)
            advantage = np.float32(draw.normal() + moment)
            samples.append(Sample(tokens, {"rl": ones, "advantage": ones * advantage, "old_logprob": ones * -3}))
        self.facts = {"reward": moment, "rollout_flops": 7.0}
        found = batches(samples, ROW, 2, 0)
        return with_routes(self.model, found) if self.record else found

    def documents(self, step: int) -> list[Any]:
        return []


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


class Crash(Exception):
    pass


class Crashing(Minibatches):
    """Stops the run when a step is asked for."""

    crash = -1

    def step(self, step: int) -> list[Batch]:
        if step == self.crash:
            raise Crash
        return super().step(step)


def table(**changes: Any) -> Rl:
    settings = {"sequence_length": ROW, "lr": 0.01, "warmup": 2, "save_every": 3, "mtp": 0.0, "minibatches": 3, "epochs": 2}
    return Rl(**{**settings, **changes})


def start(folder: Path, crash: int = -1, act: Any = None, **changes: Any) -> tuple[Trainer, Crashing, Fake]:
    keys, model = table(**changes), tiny_model()
    source = Fake(model, record=keys.replay)
    minibatches = (act or Crashing)(source, keys, folder, 5, 0, moment=Moment(model, keys))
    minibatches.crash = crash
    return Trainer(model, keys, Loss(policy=Policy(replay=keys.replay)), folder, "toy", torch.float32), minibatches, source


def finish(folder: Path, steps: int = 24, **changes: Any) -> list[int]:
    trainer, source, fake = start(folder, **changes)
    trainer.run(source, steps, quiet=True)
    return fake.asked


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rollouts of 3 minibatches, 2 epochs: 24 optimizer steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    assert finish(folder) == [0, 1, 2, 3]
    return folder


def key(sample: Sample) -> tuple:
    return (*sample.tokens.tolist(), *sample.streams["advantage"].tolist())


def test_each_epoch_sees_every_answer_once_in_another_order(tmp_path: Path) -> None:
    fake = Fake(tiny_model())
    source = Minibatches(fake, table(), tmp_path, 5, 0)
    whole = Counter(key(s) for s in documents(fake.step(1)))
    parts = [documents(source.step(6 + k)) for k in range(6)]
    assert [len(p) for p in parts] == [3, 3, 4, 3, 3, 4]
    for epoch in (parts[:3], parts[3:]):
        assert Counter(key(s) for part in epoch for s in part) == whole
    assert [Counter(map(key, p)) for p in parts[:3]] != [Counter(map(key, p)) for p in parts[3:]]
    again = Minibatches(fake, table(), tmp_path / "again", 5, 0)
    assert [[key(s) for s in documents(again.step(6 + k))] for k in range(6)] == [[key(s) for s in p] for p in parts]
    other = Minibatches(fake, table(), tmp_path / "other", 6, 0)
    assert [[key(s) for s in documents(other.step(6 + k))] for k in range(3)] != [[key(s) for s in p] for p in parts[:3]]


def test_one_minibatch_and_one_epoch_are_the_rollouts_themselves(tmp_path: Path) -> None:
    one, two = Fake(tiny_model()), Fake(tiny_model())
    source = Minibatches(one, table(minibatches=1, epochs=1), tmp_path, 5, 0)
    for step in range(3):
        for a, b in zip(source.step(step), two.step(step), strict=True):
            assert torch.equal(a.tokens, b.tokens) and all(torch.equal(a.streams[n], b.streams[n]) for n in b.streams)
        assert source.facts == two.facts
    assert not (tmp_path / "rollouts").exists()


def test_the_facts_of_a_rollout_are_told_once(straight: Path) -> None:
    told = rows(straight)
    assert [row["rollout"] for row in told] == [i // 6 for i in range(24)]
    for fact in ("reward", "rollout_flops"):
        assert [i for i, row in enumerate(told) if fact in row] == [0, 6, 12, 18]


def test_a_rollout_without_signal_is_empty_steps(tmp_path: Path) -> None:
    trainer, source, fake = start(tmp_path, minibatches=2, epochs=1)
    fake.most = 0
    trainer.run(source, 4, quiet=True)
    assert [row.get("skipped") for row in rows(tmp_path)] == [True] * 4
    assert stored(tmp_path / "rollouts" / "1.safetensors") == []


@pytest.mark.parametrize("average", ["token", "answer", "limit"])
def test_each_minibatch_has_the_average_that_the_paper_names(tmp_path: Path, average: str) -> None:
    """At old = now the surrogate is -A: over the minibatch's tokens, each answer's and then answers, or answers x max_tokens."""
    keys, model, draw = table(average=average, minibatches=3, epochs=1, max_tokens=40), tiny_model(), np.random.default_rng(0)
    lengths, advantages = draw.integers(2, 20, size=9), draw.normal(size=9)
    weights, scale = grpo.averaged(lengths, average, keys.max_tokens)
    samples = []
    for i, (n, a, w) in enumerate(zip(lengths, advantages, weights, strict=True)):
        streams = {"rl": [w] * (n + 1), "advantage": [scale * a] * (n + 1), "old_logprob": [0] * (n + 1)}
        samples.append(Sample(np.full(n + 1, i), {name: np.array([0, *s[1:]], np.float32) for name, s in streams.items()}))
    fake = Fake(model)
    fake.step = lambda step: batches(samples, ROW, 2, 0)  # type: ignore[method-assign]
    source, seen = Minibatches(fake, keys, tmp_path, 5, 0), []
    for step in range(3):
        found = source.step(step)
        who = [int(s.tokens[0]) for s in documents(found)]
        n, a = lengths[who], advantages[who]
        expected = {"token": (n * a).sum() / n.sum(), "answer": a.mean(), "limit": (n * a).sum() / (len(who) * keys.max_tokens)}[average]
        with torch.no_grad():
            for batch in found:
                logprob = torch.zeros_like(batch.streams["rl"])
                logits = model(batch.tokens, batch.positions, batch.document_ids).log_softmax(-1)
                logprob[:, 1:] = logits[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
                batch.streams["old_logprob"] = logprob
            loss = sum(float(compute(model, batch, totals(found), Loss())[0]) for batch in found)
        assert loss == pytest.approx(-expected, abs=1e-5)
        seen += who
    assert sorted(seen) == list(range(9))


# ---- going on


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    fake = Fake(tiny_model())
    source = Minibatches(fake, table(), tmp_path, 5, 0)
    source.step(0)
    for a, b in zip(source.samples, stored(tmp_path / "rollouts" / "0.safetensors"), strict=True):
        assert np.array_equal(a.tokens, b.tokens) and a.tokens.dtype == b.tokens.dtype and set(a.streams) == set(b.streams)
        assert all(np.array_equal(a.streams[n], b.streams[n]) and a.streams[n].dtype == b.streams[n].dtype for n in a.streams)


@pytest.mark.parametrize("crash", [1, 4, 6, 7, 11, 20, 23])
def test_a_run_goes_on_in_the_middle_of_a_rollout_with_the_same_bits(straight: Path, tmp_path: Path, crash: int) -> None:
    trainer, source, _ = start(tmp_path, crash)
    with pytest.raises(Crash):
        trainer.run(source, 24, quiet=True)
    asked = finish(tmp_path)
    assert weights(tmp_path) == weights(straight) and rows(tmp_path) == rows(straight)
    before = crash // 3 * 3  # the checkpoint
    assert asked == [r for r in range(4) if 6 * r >= before]  # the rollout under way was not sampled again


def test_the_trainers_own_view_of_the_rollout_is_kept_too(tmp_path: Path) -> None:
    """What a forward with the weights of the rollout's moment said cannot be computed again later, nor the experts that the engine used."""
    keys = {"tis": 2.0, "replay": True}
    finish(tmp_path / "whole", 12, **keys)
    trainer, source, _ = start(tmp_path / "stopped", 10, **keys)
    with pytest.raises(Crash):
        trainer.run(source, 12, quiet=True)
    assert finish(tmp_path / "stopped", 12, **keys) == []
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole") and rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    told = [row["rerouted"] for row in rows(tmp_path / "whole")]
    assert told[0] < 0.02 and max(told[1:6]) > 0 and told[6] < 0.02


def test_no_more_rollouts_are_kept_than_the_checkpoints_need(tmp_path: Path) -> None:
    most = 0

    class Counting(Crashing):
        def step(self, step: int) -> list[Batch]:
            nonlocal most
            found = super().step(step)
            kept = {int(p.stem) for p in (tmp_path / "rollouts").iterdir()}
            assert {s // self.each for s in checkpoint.steps(tmp_path) if s % self.each} <= kept
            most = max(most, len(kept))
            return found

    trainer, source, _ = start(tmp_path, act=Counting, minibatches=2, epochs=1, keep_every=9)
    trainer.run(source, 30, quiet=True)
    assert {s // 2 for s in checkpoint.steps(tmp_path) if s % 2} <= {int(p.stem) for p in (tmp_path / "rollouts").iterdir()}
    assert 3 <= most <= 8 < 15


def test_a_lost_rollout_is_said_in_a_sentence(straight: Path, tmp_path: Path) -> None:
    trainer, source, _ = start(tmp_path, 10)
    with pytest.raises(Crash):
        trainer.run(source, 24, quiet=True)
    file = tmp_path / "rollouts" / "1.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadInput, match=r"the rollout .*1\.safetensors, which the checkpoint is in the middle of, cannot be read"):
        finish(tmp_path)
    file.unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        finish(tmp_path)


class Slow(Crashing):
    def step(self, step: int) -> list[Batch]:
        time.sleep(0.02)
        return super().step(step)


def _child(folder: str) -> None:
    torch.set_num_threads(1)
    trainer, source, _ = start(Path(folder), act=Slow)
    trainer.run(source, 24, quiet=True)


def test_kill_9_in_the_middle_of_a_rollout_changes_nothing(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    killed = 0
    for where, after in ((whole, 999), (folder, 4), (folder, 9), (folder, 17), (folder, 999)):
        process = forked._context.Process(target=_child, args=(str(where),))
        process.start()
        while process.is_alive():
            path = where / "metrics.jsonl"
            if path.exists() and path.read_bytes().count(b"\n") > after and checkpoint.steps(where):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
    assert killed == 3 and process.exitcode == 0
    assert weights(folder) == weights(whole) and rows(folder) == rows(whole)
    assert not list(folder.rglob("*pascaline-tmp"))


def test_the_keys_are_checked() -> None:
    assert load(COIN, {"rl.minibatches": 16}).rl.epochs == 1
    with pytest.raises(BadInput, match=r"rl\.minibatches"):
        load(COIN, {"rl.minibatches": 0})


# ---- the stage


def test_the_stage_makes_the_steps_that_its_keys_say(coin_run: Path, tmp_path: Path) -> None:
    """Two rollouts, each of 3 minibatches in 2 epochs, against a reference that is the policy of the second."""
    settings = {"steps": 2, "minibatches": 3, "epochs": 2, "kl": 0.1, "reference_every": 1, "lr": 0.02, "tis": 2.0, "replay": True}
    recipe = load(coin_run / "recipe.toml", {f"rl.{key}": value for key, value in settings.items()})
    for stage in ("02-tokenizer", "04-sft"):
        (tmp_path / stage).symlink_to(coin_run / stage)
    run = Run(recipe, tmp_path, torch.device("cpu"), torch.float32, quiet=True)
    assert rl(run, "rl")["steps"] == 12
    told = rows(run.folder("rl"))
    assert [i for i, row in enumerate(told) if "accuracy" in row] == [0, 6] and all(row["loss"] for row in told)
    far = [abs(row["ratio"] - 1) for row in told]
    assert far[0] < 1e-5 and far[6] < 1e-5 and min(far[1:6]) > 1e-5  # on-policy, until the policy moves
    near = [row["kl"] for row in told]
    assert near[0] == pytest.approx(0, abs=1e-7) and near[6] == pytest.approx(0, abs=1e-7) and near[5] > 1e-6
    assert [told[i]["engine_gap"] < 1e-4 and told[i]["tis_weight"] == pytest.approx(1, abs=1e-4) for i in (0, 6)] == [True] * 2  # Law 1
    assert all(row["ratio_max"] >= row["ratio"] for row in told)
    assert told[0]["rerouted"] < 0.01 and told[6]["rerouted"] < 0.01 and all(0 <= row["rerouted"] < 1 for row in told)
