"""A longer context as a stage of the chain: there only when the recipe asks, stopped at no cost, and its model is transformers' too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch

import pascaline
from pascaline.data.shards import Corpus
from pascaline.engine import Engine
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.post import extension, sft, stages
from pascaline.recipe import load
from pascaline.runs import Metrics, read_json
from pascaline.tokenizer import Tokenizer
from pascaline.train import checkpoint

COIN = Path(__file__).parent.parent / "coin.toml"
EXTEND = {
    "corpus.max_bytes": 120_000, "corpus.held_out": 0.4, "pretrain.tokens": 8_000,
    "extend.length": 640, "extend.tokens": 10_000, "extend.tokens_per_step": 1280, "extend.micro_tokens": 640, "extend.save_every": 3,
    "extend.warmup": 1, "extend.lr": 2e-3, "extend.documents": 3, "extend.needles": 2, "rl.steps": 2, "eval.problems": 8,
}  # fmt: skip
STAGES = ("corpus", "tokenizer", "pretrain", "extend", "sft", "rl", "eval")
SETTINGS = [word for key, value in EXTEND.items() for word in ("--set", f"{key}={value}")]


def run(folder: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return forked.call(folder, "run", COIN, "--out", out, *SETTINGS, *more)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/coin.toml with a context of 640 instead of 256, run to its end; what it said is beside it. Not to be changed."""
    folder = tmp_path_factory.mktemp("extend")
    code, out, err = run(folder, folder / "run")
    assert code == 0, err
    (folder / "printed").write_text(out)
    (folder / "said").write_text(err)
    return folder / "run"


def numbers(out: Path) -> Any:
    """What was measured, without the times."""
    report = json.loads((out / "report.json").read_text())
    for row in report["stages"]:
        row["seconds"] = None
    del report["ledger"]
    return report


# ---- what it leaves


def test_the_stages_follow_from_the_recipe(extended: Path, coin_run: Path) -> None:
    assert load(COIN, EXTEND).stages == STAGES and load(COIN).stages == tuple(name for name in STAGES if name != "extend")
    for out, names in ((extended, STAGES), (coin_run, load(COIN).stages)):
        folders = [f"{number:02d}-{name}" for number, name in enumerate(names, 1)]
        assert sorted(p.name for p in out.glob("??-*")) == folders
        for before, folder in pairwise(folders):
            assert (read_json(out / folder / "lineage.json") or {})["parents"] == [f"../{before}"]
        assert [row["name"] for row in numbers(out)["stages"]] == list(names)
    assert "extension" not in numbers(coin_run) and "A longer context" not in (coin_run / "report.html").read_text()


def test_the_later_stages_start_from_the_longer_model(extended: Path) -> None:
    assert hf.read_config(extended / "03-pretrain" / "model").rope.rope_type == "default"
    for name in ("04-extend", "05-sft", "06-rl"):
        config = hf.read_config(extended / name / "model")
        assert (config.max_position_embeddings, config.rope.factor, config.rope.original_max_position_embeddings) == (640, 2.5, 256)
    rows = {row["name"]: row for row in numbers(extended)["stages"]}
    assert rows["extend"]["accuracy"] is not None and rows["pretrain"]["accuracy"] is None  # the base model is the one sft starts from
    steps = Metrics.read(extended / "04-extend" / "metrics.jsonl")
    assert len(steps) == 8 and all(row["tokens"] <= 1280 for row in steps) and rows["extend"]["flops"] > 0


def test_sft_starts_from_the_longer_model(extended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def caught(run: stages.Run, name: str, model: Any, source: Any, steps: int, first: Any) -> dict[str, Any]:
        expected = hf.load(extended / "04-extend" / "model").state_dict()
        assert all(torch.equal(found, expected[key]) for key, found in model.state_dict().items())
        return {"name": name}

    monkeypatch.setattr(sft, "train", caught)
    assert sft.sft(stages.Run(load(extended / "recipe.toml"), extended, torch.device("cpu"), torch.float32), "sft") == {"name": "sft"}


def test_what_it_says_of_before_and_after(extended: Path) -> None:
    told = read_json(extended / "04-extend" / "extension.json") or {}
    assert (told["positions"], told["length"], told["factor"], told["texts"]) == (256, 640, 2.5, 3)
    assert [m["model"] for m in told["models"]] == ["plain", "yarn", "tuned"]
    for model in told["models"]:
        assert [(span["from"], span["to"]) for span in model["loss"]] == [(1, 255), (256, 511), (512, 639)]
        assert [span["tokens"] for span in model["loss"]] == [3 * 255, 3 * 256, 3 * 128]
        assert [(row["length"], row["n"]) for row in model["needles"]] == [(512, 10), (640, 10)]
    plain, yarn, tuned = ([span["nats"] for span in model["loss"]] for model in told["models"])
    assert plain != yarn and all(t < y for t, y in zip(tuned, yarn, strict=True))  # eight more steps of training help everywhere
    printed, said = (extended.parent / "printed").read_text(), (extended.parent / "said").read_text()
    assert "YaRN, not tuned" in printed and "loss by position" in printed and "needle recall" in printed
    assert said.count("no needle with a haystack fits into 256 tokens") == 3 and "as pre-trained: nats per token" in said
    page = (extended / "report.html").read_text()
    assert "A longer context" in page and "Context extension loss" in page and f"{tuned[-1]:.3f}" in page
    assert numbers(extended)["extension"] == told


def test_a_run_that_is_not_done_shows_it_too(extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(extended, out)
    for path in ("report.json", "report.html", "done.json"):
        (out / path).unlink()
    for name in ("05-sft", "06-rl", "07-eval", "model"):
        shutil.rmtree(out / name)
    code, said, err = forked.call(tmp_path, "report", out)
    assert (code, err) == (0, "") and "YaRN, tuned" in said and "extend" in said
    assert "A longer context" in (out / "report.html").read_text()
    assert "extension" in json.loads(forked.call(tmp_path, "report", out, "--json")[1])


def test_transformers_reads_the_longer_model(extended: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = extended / "04-extend" / "model"
    own, theirs = pascaline.load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.from_numpy(Corpus(extended / "02-tokenizer" / "shards").read(0, 640).astype(np.int64))[None]
    with torch.no_grad():
        found, expected = own(tokens), theirs(tokens).logits
    torch.testing.assert_close(found[:, 256:], expected[:, 256:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, :256], expected[:, :256], rtol=1e-4, atol=1e-4)


# ---- what no stage trains on


def test_no_batch_holds_a_held_out_document(extended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, shards = load(extended / "recipe.toml"), Corpus(extended / "02-tokenizer" / "shards")
    held_out = set(np.flatnonzero(shards.held_out(recipe.corpus.held_out)).tolist())
    assert 0.2 < len(held_out) / shards.documents < 0.6
    met: dict[str, set[int]] = {}

    def caught(run: stages.Run, name: str, model: Any, loader: Any, steps: int, first: Any) -> dict[str, Any]:
        for step in range(loader.epoch_size(0) // loader.rows + 1):  # an epoch and a bit: every document that there is
            met.setdefault(name, set()).update(sample["document"] for batch in loader.documents(step) for sample in batch.values())
        return {"seconds": 0.0, "flops": 0.0}

    monkeypatch.setattr(stages, "train", caught)
    monkeypatch.setattr(extension.Check, "measure", lambda self, name, load: None)
    monkeypatch.setattr(extension.Check, "finish", lambda self, factor: None)
    current = stages.Run(recipe, extended, torch.device("cpu"), torch.float32)
    stages.pretrain(current, "pretrain")
    stages.extend(current, "extend")
    everything = set(range(shards.documents))
    assert met == {"pretrain": everything - held_out, "extend": everything - held_out}
    texts = extension.held_out_texts(shards, recipe, 256)
    known = {shards.document(i)[:640].tobytes() for i in held_out}
    assert len(texts) == 3 and all(text.tobytes() in known and len(text) == 640 for text in texts)


def test_two_ranks_extend_what_one_has_trained(extended: Path, tmp_path: Path) -> None:
    """The first rank measures while the other waits, both train, and find what one alone finds."""
    out = tmp_path / "run"
    shutil.copytree(extended, out, ignore=shutil.ignore_patterns("04-*", "05-*", "06-*", "07-*", "model", "done.json", "report.*"))
    for stage in STAGES[:3]:
        shutil.copytree(
            extended / f"{STAGES.index(stage) + 1:02d}-{stage}", out / f"{STAGES.index(stage) + 1:02d}-{stage}", dirs_exist_ok=True
        )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pascaline", "run", COIN]
    environment = os.environ | {"PYTHONPATH": f"{COIN.parent}:{COIN.parent.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", out, *SETTINGS, "--stage", "extend"], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    one, two = ([m["loss"] for m in json.loads((place / "04-extend" / extension.FILE).read_text())["models"]] for place in (extended, out))
    for mine, other in zip(one, two, strict=True):
        assert [row["nats"] for row in mine] == pytest.approx([row["nats"] for row in other], rel=0.02)
    assert len(list((out / "04-extend" / "state").glob("step-*/*.safetensors"))) == 2 * len(checkpoint.steps(out / "04-extend"))


def test_a_corpus_without_a_long_held_out_text_is_said_before_the_training(tmp_path: Path) -> None:
    code, _, err = run(tmp_path, tmp_path / "run", "--set", "corpus.held_out=1e-9")
    assert code == 2 and "holds out no text longer than the model's 256 positions" in err and "Traceback" not in err
    assert not (tmp_path / "run" / "03-pretrain" / "metrics.jsonl").exists()


# ---- stopped


def test_stopped_and_killed_in_it_it_ends_with_the_same_bits(extended: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stage = out / "04-extend"

    def until(reached: Callable[[], bool], number: int) -> tuple[int, str, str]:
        running = forked.start(tmp_path, "run", COIN, "--out", out, *SETTINGS)
        deadline = time.monotonic() + 120
        while not reached() and running.process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if running.process.is_alive():
            os.kill(running.process.pid or 0, number)
        return running.wait()

    code, _, err = until(lambda: (stage / "parts" / "plain.json").exists(), signal.SIGINT)
    assert code == 130 and ("run the same command" in err or "the same command goes on" in err), err  # in a measurement or between two
    assert "Traceback" not in err
    plain = (stage / "parts" / "plain.json").stat().st_mtime_ns
    code, _, err = until(lambda: len(Metrics.read(stage / "metrics.jsonl")) >= 5, signal.SIGKILL)
    assert code == -signal.SIGKILL and checkpoint.steps(stage)[-1] in (3, 6), err
    code, _, err = until(lambda: (stage / "model" / "config.json").exists(), signal.SIGKILL)
    assert code == -signal.SIGKILL, err
    code, _, err = run(tmp_path, out)
    assert code == 0 and (stage / "parts" / "plain.json").stat().st_mtime_ns == plain, err  # measured once
    assert numbers(out) == numbers(extended)
    assert (out / "model" / "model.safetensors").read_bytes() == (extended / "model" / "model.safetensors").read_bytes()


# ---- what it refuses


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extend.length": 256}, "extend.length = 256 must be more than the model's 256 positions"),
        ({"extend.length": "640"}, "extend.length = '640' is wrong"),
        ({"extend.lenght": 640}, "extend.lenght is not a known key; did you mean 'length'?"),
        ({"extend.sequence_length": 641}, "extend.sequence_length = 641 is more than the model's 640 positions"),
        ({"pretrain.sequence_length": 128}, "of which pretrain.sequence_length = 128 trains no more; set model.max_position_embeddings"),
        ({"corpus.held_out": 0.0}, "corpus.held_out must be more than 0"),
        ({"corpus.held_out": 1.0}, "corpus.held_out = 1.0 is wrong"),
        ({"rl.sequence_length": 641}, "rl.sequence_length = 641 is more than the model's 640 positions"),
        ({"extend": 3}, "extend must be a table"),
        ({"corpus": 3}, "corpus must be a table"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_work_is_one_sentence(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    if "corpus" in settings:
        (tmp_path / "r.toml").write_text("corpus = 3\n[extend]\nlength = 640\n")
        with pytest.raises(BadInput, match=words):
            load(tmp_path / "r.toml")
        return
    from pascaline.post.check import check

    with pytest.raises(BadInput) as caught:
        check(load(COIN, {**({} if "extend" in settings else EXTEND), **settings}))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_without_a_length_or_a_stage_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"extend\.length is missing"):
        load(COIN, {"extend.tokens": 5})
    code, _, err = forked.call(tmp_path, "run", COIN, "--out", tmp_path / "run", "--stage", "extend")
    assert code == 2 and "there is no stage 'extend'" in err


def test_what_the_table_leaves_open_is_filled_in() -> None:
    recipe = load(COIN, {"extend.length": 640})
    assert recipe.corpus.held_out == 0.02 and load(COIN).corpus.held_out == 0.0
    assert load(COIN, {"extend.length": 640, "corpus.held_out": 0.3}).corpus.held_out == 0.3


def test_a_run_from_before_these_keys_is_still_known(coin_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(coin_run, out)
    stored = json.loads((out / "recipe.json").read_text())
    del stored["extend"], stored["corpus"]["held_out"]
    (out / "recipe.json").write_text(json.dumps(stored))
    code, said, err = forked.call(tmp_path, "run", COIN, "--out", out)
    assert code == 0 and "is done already" in said, err


def test_the_ranges_double() -> None:
    assert extension.ranges(256, 1024) == [256, 512, 1024] and extension.ranges(256, 640) == [256, 512, 640]
    assert extension.ranges(256, 300) == [256, 300] and extension.ranges(4096, 131072)[-2:] == [65536, 131072]


def test_a_check_without_needles_and_a_cache_that_stays_small(extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(COIN, {**EXTEND, "extend.needles": 0})
    rows: list[int] = []
    monkeypatch.setattr(extension, "Engine", lambda model, tokenizer, max_rows: rows.append(max_rows) or Engine(model, tokenizer))
    current = stages.Run(recipe, tmp_path, torch.device("cpu"), torch.float32, quiet=True)
    texts = extension.held_out_texts(Corpus(extended / "02-tokenizer" / "shards"), recipe, 256)
    assert recipe.extend is not None
    for length in (640, 1 << 20):
        stage = recipe.extend.model_copy(update={"length": length})
        tokenizer = Tokenizer.load(extended / "02-tokenizer")
        check = extension.Check(tmp_path / str(length), tokenizer, texts, 256, stage, current.progress)
        check.measure("tuned", lambda: hf.load(extended / "04-extend" / "model"))
        told = read_json(check.part("tuned")) or {}
        assert told["needles"] == [] and told["loss"][0]["tokens"] == 3 * 255
    assert rows == [204, 1]  # positions times rows is what the cache may hold
