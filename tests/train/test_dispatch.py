"""Ranks that share out the experts against one process and against ranks that share out the data only."""

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_ranks import alone, curve, launch, samples, together, train
from trainee import loader, model, rows, trainer, weights

from pascaline.model.moe import MoE
from pascaline.train import checkpoint, parallel

GROUPED = dict(n_group=2, topk_group=1)
KINDS: dict[str, dict[str, Any]] = {
    "adamw": dict(shape=GROUPED, sequence_balance=0.01),
    "muon, recomputed": dict(shape=GROUPED, optimizer="muon", qk_clip=0.05, activation_checkpointing=True),
    "any group, no shared expert": dict(shape=dict(num_experts_per_tok=3, n_shared_experts=0), activation_checkpointing=True),
}
UNEVEN = dict(n_routed_experts=6, n_group=2, topk_group=1)  # three experts for two ranks


def agree(one: Path, other: Path, rel: float = 1e-3) -> None:
    """Every figure of every step, and the weights."""
    first, second = rows(one), rows(other)
    assert len(first) == len(second) and first[0].keys() == second[0].keys()
    for a, b in zip(first, second, strict=True):
        assert a["tokens"] == b["tokens"] and np.allclose(a["expert_load"], b["expert_load"], atol=0.02)
        for key in {"loss", "ce", "mtp", "balance", "grad_norm", "max_logit"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=rel), (key, a["step"])
    files = [load_file(folder / "model" / "model.safetensors") for folder in (one, other)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.allclose(files[0][name], files[1][name], atol=2e-3) for name in files[0])


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Fifty steps of a kind by one rank alone, and the settings; trained once for all that compare with it."""

    @cache
    def trained(kind: str) -> tuple[Path, dict[str, Any]]:
        folder, settings = tmp_path_factory.mktemp("alone"), {"eps": 1e-3, "steps": 50, **KINDS[kind]}
        alone(folder, **settings)
        return folder, settings

    return trained


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_alone_by_data_and_by_experts(kind: str, tmp_path: Path, fifty: Callable[..., Any]) -> None:
    """MTP layers and group limits included; Adam's epsilon keeps rounding from deciding a direction."""
    one, settings = fifty(kind)
    assert together(2, tmp_path / "data", **settings) == ["", ""]
    assert together(2, tmp_path / "experts", experts=2, **settings) == ["", ""]
    agree(one, tmp_path / "data")
    agree(one, tmp_path / "experts")


def test_four_ranks_two_by_two(tmp_path: Path) -> None:
    settings = {"eps": 1e-3, "steps": 16, "optimizer": "muon", "shape": UNEVEN}
    alone(tmp_path / "one", **settings)
    assert together(4, tmp_path / "four", experts=2, micro=1, **settings) == [""] * 4
    agree(tmp_path / "one", tmp_path / "four")
    assert samples(tmp_path / "one") == samples(tmp_path / "four")
    held = [len(part["master.model.layers.1.mlp.experts.down_proj"]) for part in shares(tmp_path / "four", 15)]
    assert held == [2, 2, 1, 1]  # neighbours share out the six; the two that have the same three cut them once more
    for name, whole in checkpoint_of(tmp_path / "one", 15).items():  # each rank wrote its rows, and none wrote another's
        parts = [part[name] for part in shares(tmp_path / "four", 15) if name in part]
        assert sum(len(part) if part.dim() else 1 for part in parts) == (len(whole) if whole.dim() else 1), name


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_alone_and_in_two_replicas(kind: str, tmp_path: Path, fifty: Callable[..., Any]) -> None:
    """Each has the whole model; the gradient norm among the figures counts it once."""
    one, settings = fifty(kind)
    assert together(2, tmp_path / "two", replicas=2, **settings) == ["", ""]
    agree(one, tmp_path / "two")
    assert samples(one) == samples(tmp_path / "two")


@pytest.mark.parametrize(
    "size, experts, replicas, told",
    [
        (16, 8, 1, "16 ranks: experts over 16 (among 8, each one's over 2) by all-to-all, the rest over 16"),
        (8, 2, 2, "8 ranks: 2 replicas of 4, experts over 4 (among 2, each one's over 2) by all-to-all, the rest over 4"),
        (4, 2, 2, "4 ranks: 2 replicas of 2, experts over 2 by all-to-all, the rest over 2"),
        (4, 1, 2, "4 ranks: 2 replicas of 2, all over 2"),
        (2, 1, 2, "2 ranks: 2 replicas of 1, the whole model on each"),
    ],
)
def test_the_mesh_in_words(size: int, experts: int, replicas: int, told: str) -> None:
    assert str(parallel.Ranks(0, size, experts=experts, replicas=replicas)) == told


def alike(ranks: parallel.Ranks, folder: Path, steps: int, **settings: Any) -> None:
    """Train; the replicas end with the same bits: weights, moments and biases."""
    one = trainer(folder, ranks=ranks, **settings)
    one.run(loader(ranks, 1), steps, quiet=True)
    found = {name: parallel.local(tensor).flatten().tolist() for name, tensor in one._tensors().items()}
    first, second, *others = ranks.gather(found)
    assert first != second and others == [first, second]
    assert {"exp_avg", "momentum"} <= {name.split(".")[0] for name in found}


def test_four_ranks_in_two_replicas(tmp_path: Path) -> None:
    """Twelve steps of two times two that share out the experts, or the data only: one process's, and the replicas' bits are the same."""
    settings = {"eps": 1e-3, "steps": 12, "optimizer": "muon", "qk_clip": 0.05, "shape": UNEVEN, "balance_rate": 0.01}
    alone(tmp_path / "one", **settings)
    for experts in (1, 2):
        folder = tmp_path / f"experts-{experts}"
        assert together(4, folder, alike, experts=experts, replicas=2, **settings) == [""] * 4
        agree(tmp_path / "one", folder)
        for name, whole in checkpoint_of(tmp_path / "one", 12).items():  # each share is written once, by either replica
            parts = [part[name] for part in shares(folder, 12) if name in part]
            assert sum(len(part) if part.dim() else 1 for part in parts) == (len(whole) if whole.dim() else 1), name


def checkpoint_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = shares(folder, step)
    return file


def shares(folder: Path, step: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted((folder / "state" / f"step-{step}").glob("*.safetensors"))]


def test_in_bf16_they_stay_near(tmp_path: Path) -> None:
    alone(tmp_path / "one", dtype=torch.bfloat16, steps=30)
    assert together(2, tmp_path / "two", experts=2, dtype=torch.bfloat16, steps=30) == ["", ""]
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=0.03)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_from_mesh_to_mesh(optimizer: str, tmp_path: Path) -> None:
    """One process, two ranks by experts, four two by two, two replicas, two by data, two replicas of two, one again: the same samples,
    the same losses."""
    settings: dict[str, Any] = {"eps": 1e-3, "optimizer": optimizer, "shape": UNEVEN, "micro": 1, "schedule": "constant"}
    alone(tmp_path / "straight", steps=21, **settings)
    folder = tmp_path / "changing"
    alone(folder, steps=3, **settings)
    meshes = ((2, 2, 1), (4, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2))
    for steps, (size, experts, replicas) in zip((6, 9, 12, 15, 18), meshes, strict=True):
        assert together(size, folder, experts=experts, replicas=replicas, steps=steps, seed=steps, **settings) == [""] * size
    alone(folder, steps=21, seed=8, **settings)
    assert samples(folder) == samples(tmp_path / "straight")
    agree(tmp_path / "straight", folder)


def test_killed_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"experts": 2, "steps": 24, "optimizer": "muon", "activation_checkpointing": True}
    assert together(2, tmp_path / "straight", **settings) == ["", ""]
    folder = tmp_path / "killed"
    for goal in (5, 13):
        processes = launch(2, folder, **settings)
        while (len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0) < goal and all(p.is_alive() for p in processes):
            time.sleep(0.001)
        for process in processes:
            process.kill()
            process.join()
        assert not (folder / "model").exists() and checkpoint.steps(folder)
    assert together(2, folder, seed=9, **settings) == ["", ""]
    assert weights(folder) == weights(tmp_path / "straight") and rows(folder) == rows(tmp_path / "straight")


def compiled(ranks: parallel.Ranks, folder: Path, **settings: Any) -> None:
    torch.compile = partial(torch.compile, backend="aot_eager")  # traced, but not made into kernels, which takes a while
    train(ranks, folder, compile=True, **settings)


def test_compiled_layers_learn_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eps": 1e-3, "steps": 5, "activation_checkpointing": True}
    alone(tmp_path / "one", **settings)
    assert together(2, tmp_path / "two", compiled, experts=2, **settings) == ["", ""]
    agree(tmp_path / "one", tmp_path / "two")


def test_all_ranks_leave_out_a_poisoned_step(tmp_path: Path) -> None:
    """The documents of the step are looked at without gradients, by all ranks together."""
    assert together(2, tmp_path, "poisoned", experts=2) == ["", ""]
    assert [row["step"] for row in rows(tmp_path) if "guard" in row] == [120]
    assert (tmp_path / "quarantine.jsonl").read_text().count("\n") == 1


def layer(ranks: parallel.Ranks, **shape: Any) -> tuple[MoE, MoE]:
    """An expert layer whole, and one whose experts two ranks share out."""
    whole, cut = (model(**shape).model.layers[1].mlp for _ in range(2))
    parallel._share_out(cut.experts, ranks)
    return whole, cut


def both_ways(ranks: parallel.Ranks, folder: Path) -> None:
    """Outputs, and gradients of tokens, routing weights and experts, also where a rank has no token, or nobody wants its experts."""
    whole, cut = layer(ranks)
    draw = torch.Generator().manual_seed(ranks.rank)
    for tokens, index in ((40, None), (40, 0), (40, 3), (0 if ranks.rank else 7, None), (ranks.rank, None), (0, None)):
        x = torch.randn(tokens, 16, generator=draw, requires_grad=True)
        weight = torch.rand(tokens, 2, generator=draw, requires_grad=True)
        chosen = torch.rand(tokens, 4, generator=draw).topk(2).indices
        chosen = chosen if index is None else torch.full_like(chosen, index)
        slope = torch.randn(tokens, 16, generator=draw)
        found = []
        for mlp in (whole, cut):
            x.grad = weight.grad = None
            mlp.zero_grad()
            y = mlp.experts(x, weight, chosen) if tokens or mlp is cut else x * 1.0
            (y * slope).sum().backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in mlp.experts.parameters()]
            found.append([y, x.grad, torch.zeros_like(weight) if weight.grad is None else weight.grad, *grads])
        for a, b in zip(found[0][:3], found[1][:3], strict=True):
            assert torch.allclose(a, b, atol=1e-6), tokens
        for a, b in zip(found[0][3:], found[1][3:], strict=True):
            dist.all_reduce(a)  # what both ranks' tokens ask of an expert
            assert torch.allclose(a[2 * ranks.rank : 2 * ranks.rank + 2], b, atol=1e-6), tokens
        with torch.no_grad():
            assert torch.allclose(cut.experts(x, weight, chosen), found[0][0], atol=1e-6)


def test_the_layer_both_ways(tmp_path: Path) -> None:
    assert together(2, tmp_path, both_ways, experts=2) == ["", ""]


def counted(ranks: parallel.Ranks, folder: Path) -> None:
    """Rows that a rank sends: one for each (token, rank) with any of its experts there, which with group limits is one a token."""
    sent: list[list[int]] = []
    real = dist.all_to_all_single

    def spy(out: Any, rows: Any, got: Any = None, splits: Any = None, group: Any = None) -> Any:
        if splits and rows.shape[1] == 16 and rows.dtype == torch.float32:
            sent.append(list(splits))
        return real(out, rows, got, splits, group)

    dist.all_to_all_single = spy
    for shape in ({}, GROUPED):
        x = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(ranks.rank))
        whole, cut = layer(ranks, n_routed_experts=8, num_experts_per_tok=3, **shape)
        y, routing = cut(x)
        assert torch.allclose(y, whole(x)[0], atol=1e-6)
        there, back = sent[-2:]
        needed = [len({int(e) // 4 for e in token}) for token in routing.chosen]
        assert sum(there) == sum(needed) and (sum(there) == 50 if shape else 50 < sum(there) <= 100)
        assert sum(back) == sum(told[ranks.rank] for told in ranks.gather(there))


def test_a_token_goes_once_to_each_rank_that_it_needs(tmp_path: Path) -> None:
    assert together(2, tmp_path, counted, experts=2) == ["", ""]


def loads(ranks: parallel.Ranks, folder: Path) -> None:
    """A step's loads and the biases that come of them are those of all ranks' tokens."""
    one = trainer(folder / f"rank-{ranks.rank}", ranks=ranks, save_every=9)
    seen = [router.balance for router in one.routers]
    got: list[torch.Tensor] = []
    for router, real in zip(one.routers, seen, strict=True):
        router.balance = lambda load, *rest, real=real: (got.append(load.clone()), real(load, *rest))  # type: ignore[method-assign]
    source = loader(ranks)
    one.run(source, 1, quiet=True)
    tokens = ranks.sum(torch.tensor(sum(int((b.document_ids >= 0).sum()) for b in source.step(0))))
    assert got and all(int(load.sum()) == 2 * int(tokens) for load in got)
    biases = torch.stack([router.e_score_correction_bias for router in one.routers])
    told = ranks.gather(biases.tolist())
    assert all(biases_of == told[0] for biases_of in told) and biases.any()


def test_balance_counts_all_ranks_tokens(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank-{rank}").mkdir()
    assert together(2, tmp_path, loads, experts=2) == ["", ""]
