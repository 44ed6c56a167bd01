"""Several ranks against one: the same losses from the same samples, and resumes that do not care how many there are."""

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import forked  # noqa: F401 (its fork server has torch loaded)
import numpy as np
import pytest
import torch
import trainee
from safetensors.torch import load_file
from trainee import Watched, loader, rows, trainer, weights

from pascaline.errors import BadInput
from pascaline.stopping import Stopped
from pascaline.tables import Guard
from pascaline.train import checkpoint, parallel

STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "adamw": dict(),
    "muon": dict(optimizer="muon", qk_clip=0.05),
    "low-rank queries": dict(optimizer="muon", qk_clip=0.05, shape=dict(q_lora_rank=6)),
    "tied, no mtp": dict(shape=dict(num_nextn_predict_layers=0, tie_word_embeddings=True), mtp=0.0),
    "recomputed": dict(activation_checkpointing=True, sequence_balance=0.01, z_loss=1e-3),
}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _child(rank: int, size: int, port: int, folder: str, work: Any, mesh: dict[str, int], settings: dict[str, Any]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        (globals()[work] if isinstance(work, str) else work)(parallel.start(torch.device("cpu"), **mesh), Path(folder), **settings)
    except Exception as e:
        (Path(folder) / f"error-{rank}").write_text(f"{type(e).__name__}: {e}")
        raise SystemExit(3) from e


def launch(size: int, folder: Path, work: Any = "train", experts: int = 1, replicas: int = 1, **settings: Any) -> list[Any]:
    """Start `size` ranks that run the function `work`, or that of this file which it names; so many of them share out the experts, in so
    many replicas."""
    context: Any = multiprocessing.get_context("forkserver")
    folder.mkdir(exist_ok=True)
    for left in folder.glob("error-*"):  # a rank may have heard of the other's death
        left.unlink()
    port, mesh = _free_port(), {"experts": experts, "replicas": replicas}
    processes = [context.Process(target=_child, args=(rank, size, port, str(folder), work, mesh, settings)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def together(size: int, folder: Path, work: Any = "train", **settings: Any) -> list[str]:
    """Run them to their end; what each rank failed with, "" if it did not."""
    processes = launch(size, folder, work, **settings)
    for process in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    files = [folder / f"error-{rank}" for rank in range(size)]
    found = [file.read_text() if file.exists() else "" for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    assert all((process.exitcode == 0) == (not told) for process, told in zip(processes, found, strict=True)), found
    return found


def train(ranks: parallel.Ranks, folder: Path, steps: int = STEPS, seed: int = 1, **settings: Any) -> None:
    """Train, and note which samples each step had."""
    source = loader(ranks, settings.pop("micro", 2))

    def note(step: int, _: Any) -> None:
        samples = [name["sample"] for names in source.documents(step) for _, name in sorted(names.items())]
        with open(folder / f"samples-{ranks.rank}", "a") as file:
            file.write(json.dumps([step, samples]) + "\n")

    trainer(folder, seed, ranks=ranks, **settings).run(Watched(note, source), steps, quiet=True)


def alone(folder: Path, **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    train(parallel.ALONE, folder, **settings)


def samples(folder: Path) -> dict[int, list[int]]:
    """Step -> its samples in the order of ranks."""
    out: dict[int, list[int]] = {}
    for file in sorted(folder.glob("samples-*")):
        for line in file.read_text().splitlines():
            step, found = json.loads(line)
            out[step] = out.get(step, []) + found
        file.unlink()
    return out


def curve(folder: Path, key: str = "loss") -> np.ndarray:
    return np.array([row[key] for row in rows(folder)])


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind, tmp_path):
    """Every figure of every step, and the weights; Adam's epsilon keeps rounding from deciding a direction."""
    settings = {"eps": 1e-3, **KINDS[kind]}
    alone(tmp_path / "one", **settings)
    assert together(2, tmp_path / "two", **settings) == ["", ""]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == STEPS and one[0].keys() == two[0].keys()
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"]
        assert np.allclose(a["expert_load"], b["expert_load"], atol=0.02)
        for key in ("loss", "ce", "grad_norm", "lr", "max_logit", "balance", "z", "mtp"):
            assert (key in a) == (key in b) and a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=2e-4), key
    assert samples(tmp_path / "one") == samples(tmp_path / "two")
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=2e-4) for name in first)


def test_in_bf16_two_ranks_stay_near_one(tmp_path):
    alone(tmp_path / "one", dtype=torch.bfloat16, steps=30)
    assert together(2, tmp_path / "two", dtype=torch.bfloat16, steps=30) == ["", ""]
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=0.03)
    assert curve(tmp_path / "two")[-1] < 0.9 * curve(tmp_path / "two")[0]


def test_rows_that_do_not_divide(tmp_path):
    """Three ranks for four rows: the last has less to do and computes along."""
    alone(tmp_path / "one", eps=1e-3)
    assert together(3, tmp_path / "three", eps=1e-3, micro=1) == ["", "", ""]
    assert curve(tmp_path / "three") == pytest.approx(curve(tmp_path / "one"), rel=2e-4)
    assert samples(tmp_path / "three") == samples(tmp_path / "one")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_from_one_rank_to_two_and_back(kind, tmp_path):
    """The same samples in the same order, from a checkpoint of another number of ranks; the loss goes on as if nothing were."""
    settings = {"eps": 1e-3, "schedule": "constant", **KINDS[kind]}
    alone(tmp_path / "straight", **settings)
    folder = tmp_path / "moved"
    alone(folder, steps=3, **settings)
    whole = load_file(trainee.tensors_file(folder, 3))
    assert together(2, folder, steps=6, seed=7, **settings) == ["", ""]
    parts = [load_file(file) for file in sorted((folder / "state" / "step-6").glob("*.safetensors"))]
    assert len(parts) == 2
    for name in whole:  # each rank wrote its rows: no tensor is anywhere in full but what is no matrix
        kept = sum(len(part[name]) if part[name].dim() else 1 for part in parts if name in part)
        assert kept == (len(whole[name]) if whole[name].dim() else 1), name
    alone(folder, steps=STEPS, seed=8, **settings)
    assert samples(folder) == samples(tmp_path / "straight")
    assert curve(folder) == pytest.approx(curve(tmp_path / "straight"), rel=2e-4)


def test_two_ranks_killed_end_with_the_same_bits(tmp_path):
    """On the same number of ranks a resume is exact."""
    assert together(2, tmp_path / "straight", steps=24) == ["", ""]
    folder = tmp_path / "killed"
    for goal in (5, 13):
        processes = launch(2, folder, steps=24)
        while (len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0) < goal and all(p.is_alive() for p in processes):
            time.sleep(0.001)
        for process in processes:
            process.kill()
            process.join()
        assert not (folder / "model").exists()
    assert together(2, folder, steps=24, seed=9) == ["", ""]
    assert weights(folder) == weights(tmp_path / "straight") and rows(folder) == rows(tmp_path / "straight")


def stop_one(ranks: parallel.Ranks, folder: Path) -> None:
    """A signal that only the second rank gets, in step 4."""
    source = Watched(lambda step, _: os.kill(os.getpid(), signal.SIGTERM) if step == 4 and ranks.rank else None, loader(ranks))
    with pytest.raises(Stopped, match="step 5 of 12"):
        trainer(folder, ranks=ranks).run(source, STEPS, quiet=True)


def test_a_signal_to_one_rank_stops_all_of_them_at_one_step(tmp_path):
    assert together(2, tmp_path, "stop_one") == ["", ""]
    assert checkpoint.steps(tmp_path) == [3, 5]


def poisoned(ranks: parallel.Ranks, folder: Path) -> None:
    """Noise in the second rank's batch of one step."""

    def act(step: int, batches: Any) -> Any:
        if step == 120 and ranks.rank:
            for batch in batches:
                batch.tokens[:] = torch.randint(0, trainee.VOCAB, batch.tokens.shape, generator=torch.Generator().manual_seed(step))
        return batches

    rule = Guard(window=64, sigma=4.0)
    one = trainer(folder, ranks=ranks, lr=0.003, save_every=50, schedule="constant", mtp=0.0, guard=rule)
    one.run(Watched(act, loader(ranks)), 130, quiet=True)
    assert sum(one.guard.counts.values()) == 1, one.guard.counts


def test_all_ranks_leave_out_the_step_of_one_that_is_poisoned(tmp_path):
    assert together(2, tmp_path, "poisoned") == ["", ""]
    assert [row["step"] for row in rows(tmp_path) if "guard" in row] == [120]
    (entry,) = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    second = {name["sample"] for names in loader(parallel.Ranks(1, 2)).documents(120) for name in names.values()}
    assert entry["step"] == 120 and {d["sample"] for d in entry["documents"][:2]} <= second


def lost(ranks: parallel.Ranks, folder: Path) -> None:
    """The loss of one rank is not a number, for good."""

    def act(step: int, batches: Any) -> Any:
        if ranks.rank:
            batches[0].streams["ce"][0, 1] = float("nan")
        return batches

    with pytest.raises(BadInput, match=r"toy step 2.*3th time in a row"):
        trainer(folder, ranks=ranks, guard=Guard(max_skips=3)).run(Watched(act, loader(ranks)), STEPS, quiet=True)


def test_all_ranks_give_up_together(tmp_path):
    assert together(2, tmp_path, "lost") == ["", ""]


def full_disk(ranks: parallel.Ranks, folder: Path) -> None:
    """The second rank's disk is full at the save of step 6."""
    real = checkpoint.HuggingFaceStorageWriter.write_data

    def write(self: Any, *arguments: Any) -> Any:
        if ranks.rank and self.path.name == ".step-6.tmp":
            raise OSError(28, "No space left on device")
        return real(self, *arguments)

    checkpoint.HuggingFaceStorageWriter.write_data = write
    trainer(folder, ranks=ranks, keep_last=9).run(loader(ranks), STEPS, quiet=True)


def test_a_full_disk_of_one_rank_costs_that_checkpoint_only(tmp_path):
    assert together(2, tmp_path, "full_disk") == ["", ""]
    assert checkpoint.steps(tmp_path) == [3, 9, 12]
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"step-3", "step-9", "step-12"}


def test_a_damaged_share_is_passed_over_by_all(tmp_path):
    assert together(2, tmp_path, steps=6) == ["", ""]
    file = sorted((tmp_path / "state" / "step-6").glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-3])
    samples(tmp_path)
    assert together(2, tmp_path, steps=6) == ["", ""]
    assert sorted(samples(tmp_path)) == [3, 4, 5]


def slowed(ranks: parallel.Ranks, folder: Path, nap: float = 0.02, recomputed: bool = False) -> None:
    """The second rank takes a nap in the attention of each layer, forward and backward."""
    one = trainer(folder, ranks=ranks, activation_checkpointing=recomputed)
    if ranks.rank == 1 and nap:
        for layer in one.model.model.layers:
            layer.self_attn.register_forward_hook(lambda *_: time.sleep(nap))
            layer.self_attn.register_full_backward_hook(lambda *_: time.sleep(nap))
    one.run(loader(ranks), 24, quiet=True)


@pytest.mark.parametrize("recomputed, naps", [(False, 6), (True, 8)])  # of two layers and the MTP module, which is not recomputed
def test_a_slow_rank_stands_out_and_those_that_wait_for_it_do_not(recomputed, naps, tmp_path):
    assert together(3, tmp_path, "slowed", recomputed=recomputed) == ["", "", ""]
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    own, lost = np.median([row["rank_seconds"] for row in found], 0), naps * 0.02
    assert lost <= own[1] < 1.5 * lost and max(own[0], own[2]) < 0.5 * lost
    assert np.median([row["slowest_per_median"] for row in found]) > 2


def test_waiting_for_tokens_is_no_work(tmp_path):
    """One rank is slow, and the other waits for what its experts make of the tokens."""
    assert together(2, tmp_path, "slowed", experts=2) == ["", ""]
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    own = np.median([row["rank_seconds"] for row in found], 0)
    assert own[1] >= 0.12 and own[0] < 0.06


def test_the_time_of_all_ranks_is_in_every_row(tmp_path):
    assert together(2, tmp_path, "slowed", nap=0.0) == ["", ""]
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    walls = np.diff([0.0, *(row["seconds"] for row in found)])
    shares = np.array([row["rank_seconds"] for row in found]) / walls[:, None]
    assert shares.shape == (24, 2) and (shares > 0).all() and (shares < 1).all()
