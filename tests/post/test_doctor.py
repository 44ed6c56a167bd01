"""What `pascaline doctor --recipe` says."""

import json
from pathlib import Path

import forked
import pytest

from pascaline.errors import BadInput
from pascaline.post import doctor
from pascaline.recipe import load

COIN = Path(__file__).parent.parent / "coin.toml"  # 4 experts, 4 rows of 256 tokens a step in pretrain


def test_every_training_stage_has_its_table_and_rl_is_not_cut() -> None:
    one, two = (doctor.needs(load(COIN), ranks, memory=1.0) for ranks in (1, 2))
    assert set(one["stages"]) == set(two["stages"]) == {"pretrain", "sft", "rl"}
    assert one["stages"]["rl"] == two["stages"]["rl"]
    assert 0.45 < two["stages"]["pretrain"]["moments"] / one["stages"]["pretrain"]["moments"] < 0.55
    assert one["fits"] and one["device_bytes"] == max(kinds["peak"] for kinds in one["stages"].values())


def test_what_saves_memory_is_computed_not_guessed() -> None:
    found = doctor.needs(load(COIN, {"pretrain.micro_tokens": 1024, "rl.micro_tokens": 64}), 1, memory=0.001)
    assert not found["fits"]
    saved = {one["change"]: one["bytes"] for one in found["savings"]}
    assert set(saved) == {"pretrain.activation_checkpointing = true", "pretrain.micro_tokens = 512", "2 ranks"}
    for key, value in (("pretrain.activation_checkpointing", True), ("pretrain.micro_tokens", 512)):
        other = doctor.needs(load(COIN, {"pretrain.micro_tokens": 1024, "rl.micro_tokens": 64, key: value}), 1)
        difference = found["stages"]["pretrain"]["peak"] - other["stages"]["pretrain"]["peak"]
        assert difference == saved[f"{key} = {str(value).lower()}"] > 0


def test_a_gpu_keeps_other_things_than_the_cpu() -> None:
    host, device = (doctor.needs(load(COIN, {"device": kind, "dtype": "float32"}), 1)["stages"]["pretrain"] for kind in ("cpu", "cuda"))
    assert host["weights"] == device["weights"] and host["activations"] != device["activations"]


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="start 4 ranks at most"):
        doctor.needs(load(COIN), 8)


def test_replicas_hold_as_much_as_the_ranks_of_one_and_get_fewer_rows() -> None:
    many = {"pretrain.tokens_per_step": 2048, "sft.tokens_per_step": 1024}
    four, eight = (doctor.needs(load(COIN, {**many, "parallel.replicas": n}), 4 * n)["stages"]["pretrain"] for n in (1, 2))
    assert all(four[kind] == eight[kind] for kind in ("weights", "moments", "host copy", "start"))
    assert eight["activations"] < four["activations"] and eight["peak"] < four["peak"]
    assert "8 ranks, 2 replicas; cpu" in doctor.text(doctor.needs(load(COIN, {**many, "parallel.replicas": 2}), 8))


def test_the_command(tmp_path: Path) -> None:
    code, out, err = forked.call(tmp_path, "doctor", "--recipe", COIN, "--ranks", 2, "--set", "device=cuda", "--memory", 80)
    assert code == 0, err
    assert "2 ranks" in out and "a device has 80 GiB: it fits" in out and "activation_checkpointing = true would save" in out
    code, out, _ = forked.call(tmp_path, "doctor", "--recipe", COIN, "--json")
    assert code == 0 and json.loads(out)["stages"]["sft"]["peak"] > 0
    code, _, err = forked.call(tmp_path, "doctor", "--recipe", COIN, "--ranks", 5)
    assert code == 2 and "more than the 4 experts" in err and "Traceback" not in err
