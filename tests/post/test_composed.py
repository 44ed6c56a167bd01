"""Chains of many stages compose: R1's order, with a second sft from the base and a second rl, and a stage that trains nothing between."""

import json
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest

from pascaline.ledger import cost
from pascaline.post import chain
from pascaline.recipe import load
from pascaline.runs import Metrics, read_json
from pascaline.tokenizer import Tokenizer

COIN = Path(__file__).parent.parent / "coin.toml"
CHAIN = ["sft", "rl", "reject", "sft-restart", "rl-all"]
PUZZLE = '["coin:puzzle"]'
RL = {"puzzles": PUZZLE, "prompts": 8, "samples": 4, "max_tokens": 12, "sequence_length": 32, "lr": 4e-3, "schedule": "constant"}
SFT = {"sequence_length": 64, "tokens_per_step": 1024, "lr": 1e-2, "warmup": 2}
REJECT = {"puzzles": PUZZLE, "prompts": 96, "samples": 16, "keep": 3, "max_tokens": 12}
RESTART = {"start": "pretrain", "data": '["reject"]', "examples": "false", "epochs": 3.0}
SETTINGS = {
    "chain": json.dumps(CHAIN),
    "rl.steps": 4,
    **{f"reject.{k}": v for k, v in REJECT.items()},
    **{f"sft-restart.{k}": v for k, v in {**RESTART, **SFT}.items()},
    **{f"rl-all.{k}": v for k, v in {"steps": 3, **RL}.items()},
    "eval.problems": 16,
    "eval.samples": 1,
}
GIVEN = [text for key, value in SETTINGS.items() for text in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain, run to its end without a disturbance. Not to be changed."""
    folder = tmp_path_factory.mktemp("composed")
    code, out, err = forked.call(folder, "run", COIN, "--out", folder / "run", *GIVEN)
    assert code == 0, err
    (folder / "printed").write_text(out)
    return folder / "run"


def bits(out: Path) -> dict[str, bytes]:
    """What must not depend on stops: the models, the chats with their card, and the report without its times."""
    kept = [p for p in out.rglob("*") if p.name in ("model.safetensors", "chats.jsonl", "pairs.jsonl", "card.md", "reject.json")]
    report = read_json(out / "report.json") or {}
    del report["ledger"]
    rows = [{**row, "seconds": None} for row in report["stages"]]
    files = {str(p.relative_to(out)): p.read_bytes() for p in kept if "state" not in p.parts}
    return {**files, "report": json.dumps({**report, "stages": rows}).encode()}


def test_a_composed_chain_leaves_a_folder_for_each_stage(composed: Path) -> None:
    recipe = load(composed / "recipe.toml")
    assert recipe.stages == ("corpus", "tokenizer", "pretrain", *CHAIN, "eval")
    folders = [f"{i:02d}-{name}" for i, name in enumerate(recipe.stages, 1)]
    assert sorted(p.name for p in composed.iterdir() if p.name[0].isdigit()) == folders
    assert all((composed / name / "done.json").exists() for name in folders)
    assert {p.name for p in (composed / "06-reject").iterdir()} == {
        "parts", "chats.jsonl", "pairs.jsonl", "reject.json", "card.md", "lineage.json", "done.json",
    }  # fmt: skip
    models = [name for name in folders if (composed / name / "model").exists()]
    assert models == ["03-pretrain", "04-sft", "05-rl", "07-sft-restart", "08-rl-all"]
    last = (composed / "08-rl-all" / "model" / "model.safetensors").read_bytes()
    assert (composed / "model" / "model.safetensors").read_bytes() == last
    assert chain.finished(composed) and len(list((composed / "06-reject" / "parts").glob("*.json"))) == 3


def test_lineage_names_the_stages_that_each_one_read(composed: Path) -> None:
    parents = {p.name[3:]: (read_json(p / "lineage.json") or {})["parents"] for p in composed.iterdir() if p.name[0].isdigit()}
    assert {name: [str(p) for p in found] for name, found in parents.items() if name in CHAIN} == {
        "sft": ["../03-pretrain"],
        "rl": ["../04-sft"],
        "reject": ["../05-rl"],
        "sft-restart": ["../03-pretrain", "../06-reject"],
        "rl-all": ["../07-sft-restart"],
    }


def test_the_report_measures_every_model_of_the_chain(composed: Path) -> None:
    report = read_json(composed / "report.json") or {}
    rows = {row["name"]: row for row in report["stages"]}
    assert list(rows) == ["corpus", "tokenizer", "pretrain", *CHAIN, "eval"]
    assert [name for name, row in rows.items() if row["accuracy"] is not None] == ["pretrain", "sft", "rl", "sft-restart", "rl-all"]
    assert all(row["seconds"] > 0 for row in rows.values()) and rows["reject"]["flops"] > 0
    assert (report["gain"]["before"], report["gain"]["after"]) == ("sft", "rl-all")
    assert {p["model"] for p in report["protocols"]} == {"sft", "rl", "sft-restart", "rl-all"}
    assert "gain of rl-all over sft" in (composed.parent / "printed").read_text()


def test_the_restart_begins_at_the_base(composed: Path) -> None:
    """Its first loss is the base's on chats, not that of the model before it."""
    first, before, after = (Metrics.read(composed / name / "metrics.jsonl") for name in ("04-sft", "05-rl", "07-sft-restart"))
    assert before and after[0]["loss"] > 0.5 * first[0]["loss"]


def test_the_restart_learns_from_what_reject_wrote(composed: Path) -> None:
    stage = getattr(load(composed / "recipe.toml"), "sft-restart")
    tokenizer = Tokenizer.load(composed / "02-tokenizer")
    lines = (composed / "06-reject" / "chats.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    tokens = sum(len(ids) for q, a in chats for ids in tokenizer.chat_ids(q["content"], a["reasoning_content"], a["content"]))
    learnt = (read_json(composed / "07-sft-restart" / "done.json") or {})["tokens"]
    assert stage.epochs * tokens <= learnt < stage.epochs * tokens + stage.tokens_per_step  # the last step is filled up


def test_kill_9_in_reject_changes_nothing(composed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(composed, out)
    shutil.rmtree(out / "model")
    for path in ("report.json", "report.html", "done.json"):
        (out / path).unlink()
    for path in [p for p in out.iterdir() if p.name[:2] in ("06", "07", "08", "09")]:
        shutil.rmtree(path)
    parts = out / "06-reject" / "parts"
    running = forked.start(tmp_path, "run", COIN, "--out", out, *GIVEN)
    deadline = time.monotonic() + 60
    while not list(parts.glob("*.json")) and running.process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    running.process.kill()
    assert running.wait()[0] == -signal.SIGKILL
    begun = {p: p.stat().st_mtime_ns for p in parts.glob("*.json")}
    assert 1 <= len(begun) < 3 and not (out / "06-reject" / "done.json").exists()
    code, _, err = forked.call(tmp_path, "run", COIN, "--out", out, *GIVEN)
    assert code == 0, err
    assert begun.items() <= {p: p.stat().st_mtime_ns for p in parts.glob("*.json")}.items()  # sampled once
    assert bits(out) == bits(composed)
    ends = {stage["name"]: stage["ends"] for stage in cost(out)["stages"]}
    assert ends["reject"] == {"done": 2, "killed": 1}  # the first was the undisturbed run's
