"""Meshes that fit no recipe: one sentence with what would fit, before anything starts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pascaline
from pascaline.errors import BadInput
from pascaline.post.check import check_ranks
from pascaline.recipe import Recipe, load
from pascaline.runs import read_json

COIN = Path(__file__).parent.parent / "coin.toml"  # 4 experts, 4 rows of 256 tokens in pretrain and 16 of 64 in sft

DENSE = {"model__first_k_dense_replace": 2, "model__num_nextn_predict_layers": 0}


def recipe(**changes: Any) -> Recipe:
    return load(COIN, {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("ranks, experts", [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4)])
def test_what_fits(ranks: int, experts: int) -> None:
    check_ranks(recipe(parallel__experts=experts, parallel__ranks=ranks), ranks)
    check_ranks(recipe(parallel__experts=experts), ranks)


@pytest.mark.parametrize("ranks, replicas, experts", [(2, 2, 1), (8, 2, 4), (8, 4, 2), (12, 3, 4)])
def test_more_ranks_than_experts_fit_in_replicas(ranks: int, replicas: int, experts: int) -> None:
    many = {"pretrain__tokens_per_step": 256 * ranks, "sft__tokens_per_step": 64 * ranks}
    check_ranks(recipe(parallel__experts=experts, parallel__replicas=replicas, **many), ranks)


@pytest.mark.parametrize(
    "size, changes, told",
    [
        (1, {"parallel__ranks": 2}, r"parallel.ranks = 2, but here is one process.*--nproc-per-node=2.*parallel.ranks = 1"),
        (4, {"parallel__ranks": 2}, r"parallel.ranks = 2, but here are 4"),
        (
            1,
            {"parallel__experts": 2},
            r"parallel.experts = 2 needs.*is one process.*torchrun --nproc-per-node=2 -m.*set it to 1\.",
        ),
        (2, {"parallel__experts": 4}, r"parallel.experts = 4 needs.*are 2: .*--nproc-per-node=4.*set it to 1 or 2\."),
        (3, {"parallel__experts": 3}, r"parallel.experts = 3 does not divide the 4 experts of a layer; 1, 2 or 4 do"),
        (2, {"parallel__experts": 2, **DENSE}, r"parallel.experts = 2, but no layer"),
        (5, {"pretrain__tokens_per_step": 4096}, r"5 ranks are more than the 4 experts.*start 4 ranks at most"),
        (8, {}, r"8 ranks are more than the 4 experts.*start 4 ranks at most, or set parallel.replicas = 2 \(groups of 4 that hold"),
        (12, {"parallel__experts": 2}, r"start 4 ranks at most, or set parallel.replicas = 3 \(groups of 4"),
        (24, {"parallel__replicas": 2}, r"12 ranks in each of 2 replicas are more.*start 8 ranks at most, or set parallel.replicas = 6"),
        (8, {"parallel__replicas": 3}, r"parallel.replicas = 3 needs.*are 8: .*--nproc-per-node=3 .*set it to 2, 4 or 8\."),
        (1, {"parallel__replicas": 2}, r"parallel.replicas = 2 needs.*is one process: .*--nproc-per-node=2 .*set it to 1\."),
        (
            6,
            {"parallel__replicas": 2, "parallel__experts": 2},
            r"parallel.experts = 2 needs.*it in each of 2 replicas, and here are 3: .*--nproc-per-node=4 .*set it to 1\.",
        ),
        (33, DENSE, r"33 ranks are more than the 32 rows"),
        (
            4,
            {"pretrain__tokens_per_step": 512},
            r"pretrain.tokens_per_step = 512 is 2 rows of 256.*2 would have none; start 2 at most, .*1024",
        ),
        (
            4,
            {"sft__tokens_per_step": 64},
            r"sft.tokens_per_step = 64 is 1 row of 64 tokens: of 4 ranks 3 would have none; start 1 at most, or",
        ),
        (4, {"extend__length": 512, "extend__tokens_per_step": 1024}, r"extend.tokens_per_step = 1024 is 2 rows of 512"),
    ],
)
def test_what_does_not(size: int, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        check_ranks(recipe(**changes), size)


def test_a_mesh_is_refused_where_torchrun_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="torchrun --nproc-per-node=2"):
        pascaline.run(COIN, out=tmp_path / "run", overrides={"parallel.experts": 2}, stage="corpus", quiet=True)
    assert not (tmp_path / "run").exists()


def test_under_torchrun_it_is_one_sentence(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pascaline"]
    environment = os.environ | {"PYTHONPATH": f"{COIN.parent}:{COIN.parent.parent}", "OMP_NUM_THREADS": "1"}
    asked = ["run", COIN, "--out", tmp_path / "run", "--set", "parallel.experts=4"]
    done = subprocess.run([*torchrun, *asked], capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode != 0 and done.stderr.count("parallel.experts = 4 needs as many ranks") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_another_mesh(tmp_path: Path) -> None:
    pascaline.run(COIN, out=tmp_path / "run", overrides={"parallel.ranks": 1}, stage="corpus", quiet=True)
    pascaline.run(COIN, out=tmp_path / "run", stage="tokenizer", quiet=True)
    assert (read_json(tmp_path / "run" / "recipe.json") or {})["parallel"] == {"ranks": 0, "experts": 1, "replicas": 1}
