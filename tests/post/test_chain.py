"""The whole chain: what it leaves, that it goes on wherever it was stopped, and that a stop changes nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import load_file
from tiny import CLOCK

import pascaline
from pascaline.ledger import cost
from pascaline.post import chain, stages
from pascaline.recipe import Recipe, load, parse
from pascaline.runs import Metrics, read_json
from pascaline.train import checkpoint, sinks

COIN = Path(__file__).parent.parent / "coin.toml"
STAGES = Recipe().stages
ROW = {"name", "accuracy", "accuracy_low", "accuracy_high", "n", "mean_tokens", "seconds", "flops"}


def report(out: Path) -> dict[str, Any]:
    """report.json without the times."""
    found = json.loads((out / "report.json").read_text())
    assert found.pop("ledger")["total"]["all"]["device_hours"] > 0
    for row in found["stages"]:
        row["seconds"] = None
    return found


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def same(out: Path, other: Path) -> bool:
    return weights(out) == weights(other) and report(out) == report(other)


def files(out: Path) -> dict[Path, tuple[int, int]]:
    """What counts; a killed process may leave a half-written neighbour behind, which the next one sweeps up."""
    kept = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock" and not p.name.endswith("pascaline-tmp"))
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in kept}


def litter(out: Path) -> list[str]:
    return [p.name for p in out.rglob("*") if p.name.endswith((".tmp", "pascaline-tmp"))]


def reopened(run: Path, out: Path, stage: str) -> Path:
    """A copy of a finished run as it is when everything up to `stage` is done."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    for path in ("report.json", "report.html", "done.json"):
        (out / path).unlink()
    for number, name in enumerate(STAGES, 1):
        if number > STAGES.index(stage) + 1:
            shutil.rmtree(out / f"{number:02d}-{name}")
    return out


# ---- what it leaves


def test_the_tiny_recipe_leaves_a_report(tiny_run: Path) -> None:
    found = json.loads((tiny_run / "report.json").read_text())
    assert {"stages", "majority", "best_of", "seed", "versions", "machine"} <= set(found)
    assert [row["name"] for row in found["stages"]] == list(STAGES) and all(set(row) == ROW for row in found["stages"])
    for row in found["stages"]:
        assert row["seconds"] > 0
        if row["name"] in ("pretrain", "sft", "rl"):
            assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1 and row["n"] == 16
            assert 1 <= row["mean_tokens"] <= 48
    for curve in ("majority", "best_of"):
        assert [point["k"] for point in found[curve]] == [1, 2, 4] and all(0 <= point["accuracy"] <= 1 for point in found[curve])
    assert found["seed"] == 1 and found["versions"]["torch"] == torch.__version__
    assert found["machine"]["dtype"] == "float32" and found["machine"]["cores"] >= 1
    page = (tiny_run / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html") and page.count("<svg") >= 6 and "<script" not in page


def test_mtp_modules_learn_in_every_stage(coin_run: Path) -> None:
    """So that their drafts fit the policy that is served."""
    for name in ("03-pretrain", "04-sft", "05-rl"):
        found = [row for row in Metrics.read(coin_run / name / "metrics.jsonl") if "skipped" not in row]
        assert found and all(row["mtp"] > 0 for row in found), name
    before, after = (load_file(coin_run / name / "model" / "model.safetensors") for name in ("04-sft", "05-rl"))
    own = [name for name in before if name.startswith("model.layers.2.") and not name.endswith(("embed_tokens.weight", "head.weight"))]
    assert len(own) > 10 and all(not torch.equal(before[n], after[n]) for n in own if "proj" in n and ".experts." not in n)


def test_every_stage_says_where_it_came_from(tiny_run: Path) -> None:
    for number, name in enumerate(STAGES, 1):
        told = read_json(tiny_run / f"{number:02d}-{name}" / "lineage.json")
        assert told is not None and told["stage"] == name and told["seed"] == 1
        parents = [f"../{number - 1:02d}-{STAGES[number - 2]}"] if number > 1 else []
        assert told["parents"] == parents and all((tiny_run / f"{number:02d}-{name}" / p).is_dir() for p in parents)
    resolved = load(tiny_run / "recipe.toml")
    assert resolved == parse(read_json(tiny_run / "recipe.json") or {}, "") and resolved.dtype == "float32"
    steps = [row["step"] for row in Metrics.read(tiny_run / "03-pretrain" / "metrics.jsonl")]
    assert steps == list(range(20))
    assert not litter(tiny_run)


def test_pretraining_gets_the_tokens_it_was_promised(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not divide a step must not shorten the training."""
    recipe = load(tiny_run / "recipe.toml", {"pretrain.tokens": 10_000, "pretrain.tokens_per_step": 500, "pretrain.sequence_length": 200})
    monkeypatch.setattr(stages, "train", lambda run, name, model, source, steps, first: {"steps": steps})
    assert stages.pretrain(stages.Run(recipe, tiny_run, torch.device("cpu"), torch.float32), "pretrain") == {
        "steps": 25
    }  # of two rows each


def test_the_model_loads_here_and_in_transformers(tiny_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_run / "model"
    own, theirs = pascaline.load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Make 12 from 6, 6, 13."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    engine = pascaline.Engine(folder)
    assert engine.tokenizer is not None and engine.tokenizer.prompt_ids(chat) == ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(own(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert weights(tiny_run) == (tiny_run / "05-rl" / "model" / "model.safetensors").read_bytes()


def test_rl_changes_the_weights_and_learns(coin_run: Path) -> None:
    before = load_file(coin_run / "04-sft" / "model" / "model.safetensors")
    after = load_file(coin_run / "05-rl" / "model" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) > len(before) // 2
    assert not any("e_score_correction_bias" in name for name in moved)  # balance_rate = 0 in rl
    rows = {row["name"]: row for row in report(coin_run)["stages"]}
    assert rows["sft"]["accuracy"] < 0.7 < 0.9 < rows["rl"]["accuracy"]
    steps = Metrics.read(coin_run / "05-rl" / "metrics.jsonl")
    assert sum(row["reward"] for row in steps[:5]) / 5 < 0.7 < sum(row["reward"] for row in steps[-5:]) / 5
    assert all(row["mismatch"] < 1e-4 and row["clipped"] == 0 for row in steps if "skipped" not in row)


# ---- done once


def test_a_finished_run_is_told_again_and_left_alone(tiny_run: Path, tmp_path: Path) -> None:
    before = files(tiny_run)
    recipe = COIN.parent.parent / "recipes" / "tiny.toml"
    began = time.perf_counter()
    code, out, err = forked.call(tmp_path, "run", recipe, "--out", tiny_run, "--set", "dtype=float32")
    assert time.perf_counter() - began < 10
    assert (code, err) == (0, "") and out.startswith(f"{tiny_run} is done already")
    assert (tiny_run.parent / "printed").read_text() in out.split("\n\n", 1)[1]
    assert files(tiny_run) == before


def test_a_finished_run_is_told_without_torch(tiny_run: Path) -> None:
    code = (
        "import sys; from pascaline.cli import app; from pascaline.post.chain import run\n"
        f"assert run('recipes/tiny.toml', {str(tiny_run)!r}, {{'dtype': 'float32'}})['seed'] == 1\n"
        f"sys.argv = ['pascaline', 'report', {str(tiny_run)!r}]; app(standalone_mode=False)\n"
        "assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=COIN.parent.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout and "pascaline chat" in done.stdout


def test_a_stage_at_a_time(coin_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for name in STAGES[:2]:
        code, said, err = forked.call(tmp_path, "run", COIN, "--out", out, "--stage", name)
        assert code == 0 and said == f"{out}: stage {name} is done. Run the same command without --stage to go on.\n", err
    assert sorted(p.name for p in out.iterdir()) == [".lock", "01-corpus", "02-tokenizer", "ledger.jsonl", "recipe.json", "recipe.toml"]
    before = files(out / "01-corpus") | files(out / "02-tokenizer")
    code, said, err = forked.call(tmp_path, "run", COIN, "--out", out, "--stage", "eval")  # the last stage ends the run
    assert code == 0 and "gain of rl over sft" in said, err
    assert files(out / "01-corpus") | files(out / "02-tokenizer") == before
    assert same(out, coin_run)


def test_fresh_keeps_the_old_run_aside(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def run(*more: object) -> tuple[int, str, str]:
        return forked.call(tmp_path, "run", COIN, "--out", out, "--stage", "corpus", *more)

    assert run()[0] == 0
    first = files(out)
    other = ("--set", "seed=2", "--set", "rl.steps=3", "--set", "puzzles.coin:puzzle.traces=9")
    code, said, err = run(*other)
    assert (code, said) == (2, "") and err.count("\n") == 1
    assert "another recipe (different: puzzles.coin:puzzle.traces, rl.steps, seed)" in err and "--fresh" in err
    assert files(out) == first
    assert run(*other, "--fresh")[0] == 0
    old = tmp_path / "run.old-1"
    assert {p.relative_to(old) for p in files(old)} == {p.relative_to(out) for p in first}
    assert load(old / "recipe.toml").seed == 1 and load(out / "recipe.toml").seed == 2
    first_cost, both = cost(old)["total"], cost(out)
    assert both["aside"] == {"all": first_cost["all"], "ends": {"done": 1}} and [s["ends"] for s in both["stages"]] == [{"done": 1}]
    assert both["total"]["all"]["seconds"] == pytest.approx(first_cost["all"]["seconds"] + both["total"]["final"]["seconds"])
    assert run("--fresh", "--set", "rl.stpes=3")[0] == 2 and run("--fresh", "--set", "device=nvidia")[0] == 2
    assert load(out / "recipe.toml").seed == 2 and not (tmp_path / "run.old-2").exists()  # nothing moved for a mistake
    assert run("--fresh")[0] == 0 and load(tmp_path / "run.old-2" / "recipe.toml").seed == 2
    shutil.rmtree(old)
    assert cost(out)["aside"]["ends"] == {"done": 2} and cost(out)["total"]["ratio"] > 1  # also without the old folders


def test_a_run_goes_on_with_other_sinks_and_prices(coin_run: Path, tmp_path: Path) -> None:
    out = reopened(coin_run, tmp_path / "run", "rl")
    given = ("--set", "ledger.price=2.5", "--set", "ledger.watts=100", "--set", "ledger.currency=EUR")
    code, said, err = forked.call(tmp_path, "run", COIN, "--out", out, *given)
    assert code == 0 and weights(out) == weights(coin_run) and "EUR" in said and "100 W a device" in said, err
    assert load(out / "recipe.toml").ledger.price == 2.5
    asked = load(COIN, {"sinks": ["tensorboard", "trackio"]})
    assert chain._settle(asked, out).sinks == ["tensorboard", "trackio"]
    told = read_json(out / "06-eval" / "lineage.json") or {}
    assert told["cost"]["final"]["money"] == pytest.approx(2.5 * told["cost"]["final"]["device_hours"])
    code, said, err = forked.call(tmp_path, "run", COIN, "--out", out, "--set", "ledger.price=5")  # finished: told with this price
    assert code == 0 and "is done already" in said and "EUR" not in said and "money" in said, err


TOLD = """
class Run:
    def log(self, metrics, step): print(step, metrics["loss"], "gemm_share" in metrics)
    def finish(self): print("end")
def init(project, name, **more): return Run()
"""


def test_the_sinks_of_the_recipe_get_each_training_stage(coin_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio.py").write_text(TOLD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sinks, "PATIENCE", 60.0)
    monkeypatch.setattr(
        "pascaline.post.stage.peak", lambda device, measured: {} if measured else {"float32": 100.0}
    )  # quiet: only what is known
    out = reopened(coin_run, tmp_path / "run", "pretrain")
    chain.run(COIN, out, {"sinks": ["trackio"]}, stage="sft", quiet=True)
    rows = Metrics.read(out / "04-sft" / "metrics.jsonl")
    assert (out / "sinks" / "trackio-sft.log").read_text().splitlines() == [f"{r['step']} {r['loss']} True" for r in rows] + ["end"]
    assert all(0 < row["gemm_share"] < 1 for row in rows)
    assert (out / "04-sft" / "model" / "model.safetensors").read_bytes() == (
        coin_run / "04-sft" / "model" / "model.safetensors"
    ).read_bytes()


def test_a_mistake_found_in_the_first_stage_does_not_hold_the_folder(tmp_path: Path) -> None:
    """Nothing is done yet that another recipe could spoil, so the corrected command needs no --fresh."""
    out = tmp_path / "run"
    forked.call(tmp_path, "run", COIN, "--out", out, "--stage", "corpus")
    (out / "01-corpus" / "done.json").unlink()
    code, _, err = forked.call(tmp_path, "run", COIN, "--out", out, "--stage", "corpus", "--set", "seed=2")
    assert code == 0 and load(out / "recipe.toml").seed == 2, err


# ---- stopped


def test_ctrl_c_in_pretraining(coin_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [Path(sys.executable).parent / "pascaline", "run", COIN, "--out", out]
    environment = os.environ | {"PYTHONPATH": f"{COIN.parent.parent}{os.pathsep}{COIN.parent}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        _until(lambda: _rows(out / "03-pretrain") >= 3, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=60)
    steps = len(Metrics.read(out / "03-pretrain" / "metrics.jsonl"))
    assert (process.returncode, said) == (130, "")
    assert [line for line in err.splitlines() if line.startswith("pascaline:")] == [
        f"pascaline: stopped after pretrain step {steps} of 16; run the same command to go on."
    ] and "Traceback" not in err
    assert checkpoint.steps(out / "03-pretrain")[-1] == steps
    code, _, err = forked.call(tmp_path, "run", COIN, "--out", out)
    assert code == 0 and same(out, coin_run), err


def test_sigterm_saves_and_is_no_failure(coin_run: Path, tmp_path: Path) -> None:
    """As a scheduler stops a job: saved, exit code 0, and the same command goes on."""
    out = tmp_path / "run"
    command = [Path(sys.executable).parent / "pascaline", "run", COIN, "--out", out, "--stage", "pretrain"]
    environment = os.environ | {"PYTHONPATH": str(COIN.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        _until(lambda: _rows(out / "03-pretrain") >= 3, lambda: process.poll() is None)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "run the same command to go on" in err and not (out / "03-pretrain" / "done.json").exists()
    assert checkpoint.steps(out / "03-pretrain")[-1] == len(Metrics.read(out / "03-pretrain" / "metrics.jsonl"))


def test_two_ranks_walk_the_whole_road(coin_run: Path, tmp_path: Path) -> None:
    """torchrun: the same recipe; the training stages together, one that is done already is left alone."""
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pascaline"]
    environment = os.environ | {"PYTHONPATH": f"{COIN.parent}:{COIN.parent.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, "run", COIN, "--out", out, "--json"], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == read_json(out / "report.json")
    for stage in ("03-pretrain", "04-sft"):
        one, two = (Metrics.read(place / stage / "metrics.jsonl") for place in (coin_run, out))
        assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=0.02)
        assert len(list((out / stage / "state").glob("step-*/*.safetensors"))) == 2 * len(checkpoint.steps(out / stage))
    again = subprocess.run([*torchrun, "run", COIN, "--out", out], capture_output=True, text=True, env=environment, timeout=100)
    assert again.returncode == 0 and again.stdout.count("is done already") == 1, again.stderr
    wrong = subprocess.run(
        [*torchrun, "run", COIN, "--out", out, "--set", "seed=2"], capture_output=True, text=True, env=environment, timeout=100
    )
    assert wrong.returncode != 0 and wrong.stderr.count("holds a run of another recipe") == 1


def test_two_ranks_that_share_out_the_experts_walk_it_too(coin_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pascaline"]
    environment = os.environ | {"PYTHONPATH": f"{COIN.parent}:{COIN.parent.parent}", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "run", COIN, "--out", out, "--set", "parallel.experts=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    for stage in ("03-pretrain", "04-sft"):
        one, two = (Metrics.read(place / stage / "metrics.jsonl") for place in (coin_run, out))
        assert [row["tokens"] for row in one] == [row["tokens"] for row in two]
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=0.02)
        told = f"{stage[3:]}: 2 ranks: experts over 2 by all-to-all, the rest over 2"
        assert (done.stdout + done.stderr).count(told) == 1
    assert read_json(out / "report.json") and (out / "model" / "config.json").exists()


def _rows(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _until(reached: Callable[[], bool], alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached() and alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_kill_9_anywhere_changes_nothing(coin_run: Path, tmp_path: Path) -> None:
    """Killed in every stage and at random moments, the chain ends with the bits of the run that was left alone."""
    out, chance = tmp_path / "run", random.Random(0)
    moments: list[Callable[[], bool]] = [
        lambda: (out / "recipe.json").exists(),
        lambda: (out / "02-tokenizer" / "tokenizer.json").exists(),
        lambda: _rows(out / "03-pretrain") >= 7,
        lambda: _rows(out / "03-pretrain") >= 12,
        lambda: (out / "03-pretrain" / "model").exists(),
        lambda: _rows(out / "04-sft") >= 9,
        lambda: _rows(out / "05-rl") >= 5,
        lambda: _rows(out / "05-rl") >= 16,
        lambda: len(list((out / "06-eval" / "parts").glob("*.json"))) >= 4,
        lambda: (out / "model").exists() or (out / ".model.pascaline-tmp").exists(),
    ]
    kills = 0
    kept: dict[Path, tuple[int, int]] = {}
    for moment in moments:
        running = forked.start(tmp_path, "run", COIN, "--out", out)
        _until(moment, running.process.is_alive)
        time.sleep(chance.uniform(0, 0.05))
        running.process.kill()
        code, _, err = running.wait()
        assert code in (0, -signal.SIGKILL), err
        kills += code != 0
        kept = files(out / "06-eval" / "parts") | kept
    code, _, err = forked.call(tmp_path, "run", COIN, "--out", out)
    assert code == 0 and kills >= 7, err
    assert len(kept) > 4 and kept.items() <= files(out / "06-eval" / "parts").items()  # measured once
    assert same(out, coin_run) and not litter(out)
    for name in ("03-pretrain", "04-sft", "05-rl"):
        rows = [Metrics.read(folder / name / "metrics.jsonl") for folder in (out, coin_run)]
        for row in (row for metrics in rows for row in metrics):
            for key in CLOCK:
                row.pop(key, None)
        assert rows[0] == rows[1]
    traces = [(folder / "05-rl" / "traces.jsonl").read_bytes() for folder in (out, coin_run)]
    assert traces[0] == traces[1] and len(traces[0].splitlines()) == 11
    _compare_costs(cost(out), cost(coin_run), kills)


def _compare_costs(killed: dict[str, Any], straight: dict[str, Any], kills: int) -> None:
    """The final run is the same; all attempts are what was killed besides."""
    ends = [stage["ends"] for stage in killed["stages"]]
    assert 3 <= sum(end.get("killed", 0) for end in ends) <= kills  # a kill may fall between two stages, or before the first
    assert all(end["done"] >= 1 for end in ends) and all(stage["ends"] == {"done": 1} for stage in straight["stages"])
    for stage, other in zip(killed["stages"], straight["stages"], strict=True):
        assert stage["final"]["flops"] == pytest.approx(other["final"]["flops"]) and other["ratio"] == pytest.approx(1)
        assert stage["ratio"] > 1 - 1e-9
        assert other["final"]["flops"] == other["all"]["flops"]
    assert killed["total"]["all"]["flops"] >= killed["total"]["final"]["flops"] and killed["total"]["ratio"] > 1


def test_what_a_kill_at_the_very_end_leaves_is_cleared(coin_run: Path, tmp_path: Path) -> None:
    out = reopened(coin_run, tmp_path / "run", "eval")
    (out / ".model.pascaline-tmp").mkdir()
    (out / ".model.pascaline-tmp" / "model.safetensors").write_text("half")
    (out / "03-pretrain" / "model" / ".model.safetensors.1-ab.pascaline-tmp").write_text("half")
    code, _, err = forked.call(tmp_path, "run", COIN, "--out", out)
    assert code == 0 and same(out, coin_run) and not litter(out), err


def test_a_damaged_checkpoint_is_one_sentence(coin_run: Path, tmp_path: Path) -> None:
    out = reopened(coin_run, tmp_path / "run", "rl")
    (out / "05-rl" / "done.json").unlink()
    for file in (out / "05-rl" / "state").glob("step-*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    code, said, err = forked.call(tmp_path, "run", COIN, "--out", out)
    assert (code, said) == (2, "") and "Traceback" not in err
    assert sum(line.startswith("pascaline: the checkpoint") and "is damaged" in line for line in err.splitlines()) == 1


# ---- no space


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    """A small file system; a function that gives it another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        return shutil.which("mount") is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0

    if not mount("size=200k"):
        pytest.skip("mounting a file system is not permitted here")
    yield place, lambda size: mount("remount", f"size={size}k")
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(disk: Any, coin_run: Path, tmp_path: Path) -> None:
    place, resize = disk
    reached = set()
    for size in (200, 500, 800, 1100, 1700, 2500, 3300, 4100, 20_000):
        assert resize(size)
        code, said, err = forked.call(tmp_path, "run", COIN, "--out", place / "run")
        if code == 0:
            break
        ours = [line for line in err.splitlines() if line.startswith("pascaline:")]
        assert code == 2 and said == "" and "Traceback" not in err
        assert len(ours) == 1 and "no space left on the device" in ours[0]
        assert not litter(place)
        reached.add(err.splitlines()[-2].split(":")[0])
    assert code == 0 and same(place / "run", coin_run)
    assert len(reached) >= 2, reached


@pytest.mark.parametrize("place", ["train.checkpoint.dcp.save", "model.weights.os.pwrite", "runs.os.fsync"])
def test_no_space_inside_a_library_is_the_same_sentence(
    place: str, coin_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import SafetensorError

    from pascaline.cli import main

    out = reopened(coin_run, tmp_path / "run", "pretrain")
    (out / "03-pretrain" / "done.json").unlink()
    shutil.rmtree(out / "03-pretrain" / "model")
    if place == "train.checkpoint.dcp.save":
        shutil.rmtree(out / "03-pretrain" / "state")

    def full(*_: Any, **__: Any) -> None:
        if "os." in place:
            raise OSError(28, "No space left on device")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(f"pascaline.{place}", full)
    monkeypatch.setattr(sys, "argv", ["pascaline", "run", str(COIN), "--out", str(out), "--stage", "pretrain", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    said, err = capsys.readouterr()
    assert (caught.value.code, said) == (2, "") and err.count("\n") == 1 and "no space left on the device" in err
    assert not litter(out) and not (out / "03-pretrain" / "model" / "config.json").exists()
