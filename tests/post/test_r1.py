"""The recipes of R1 and R1-Zero, every stage of them, on the coin instead of puzzles that take minutes to learn."""

import json
import tomllib
from pathlib import Path
from typing import Any

import forked
import pytest

from pascaline.recipe import parse, to_toml
from pascaline.runs import Metrics, read_json
from pascaline.tables import kind

TESTS = Path(__file__).parent.parent
GRADE = "grade:coin:puzzle"
SMALL: dict[str, dict[str, Any]] = {
    "pretrain": {"tokens": 16_000, "tokens_per_step": 1024, "sequence_length": 64, "optimizer": "adamw", "lr": 5e-3, "warmup": 2},
    "sft": {"epochs": 4.0, "tokens_per_step": 1024, "sequence_length": 64, "lr": 1e-2, "warmup": 2},
    "prefer": {"tokens_per_step": 512, "sequence_length": 64, "warmup": 2},
    "rl": {"steps": 3, "prompts": 6, "samples": 4, "max_tokens": 12, "sequence_length": 32, "lr": 4e-3, "warmup": 1, "wrong_reward": 0.0},
    "reject": {"prompts": 48, "samples": 4, "max_tokens": 12},
    "distil": {"steps": 2, "prompts": 6, "samples": 2, "max_tokens": 12, "sequence_length": 32, "warmup": 1},
}


def small(name: str) -> str:
    """The recipe of that name with the coin's puzzle and sizes; its chain and who starts from whom as they are."""
    raw = tomllib.loads((TESTS.parent / "recipes" / f"{name}.toml").read_text())
    coin = tomllib.loads((TESTS / "coin.toml").read_text())
    for table in (stage for stage in raw if kind(stage) in SMALL):
        asked = {"puzzles": [GRADE if table.endswith("-grader") else "coin:puzzle"]} if "puzzles" in raw[table] else {}
        raw[table] |= SMALL[kind(table)] | asked
    for few in (name for name in raw if name in ("sft-restart", "sft-traces")):
        raw[few]["epochs"] = 25.0  # of the few chats that reject leaves
    if "pretrain-student" in raw:
        raw["pretrain-student"]["model"] |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    evaluation = coin["eval"] | {"problems": 32, "votes": 4, "vote_problems": 8}
    if "grader" in raw["eval"]:
        evaluation["grader"], coin["puzzles"][GRADE] = raw["eval"]["grader"], {"examples": 300}
    return to_toml(parse(raw | {key: coin[key] for key in ("dtype", "corpus", "puzzles", "tokenizer", "model")} | {"eval": evaluation}, ""))


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("r1")
    (folder / "r1.toml").write_text(small("r1"))
    code, said, err = forked.start(folder, "run", folder / "r1.toml", "--out", folder / "run").wait(400)
    assert code == 0, err
    return folder / "run", said


def test_the_chain_of_r1_runs_whole_and_ends_in_one_table(r1: tuple[Path, str]) -> None:
    out, said = r1
    report = json.loads((out / "report.json").read_text())
    rows = {row["stage"]: row for row in report["table"]["rows"]}
    assert list(rows) == ["sft", "rl", "sft-restart", "rl-all", "rl-last", "sft-student", "rl-student", "sft-traces", "distil"]
    assert report["table"]["judge"] == "prefer" and report["table"]["against"] == "sft"
    for name, row in rows.items():
        assert set(row["puzzles"]["coin:puzzle"]) == {"pass_1", "pass_k", "maj_k"} and 0 <= row["format"] <= 1, name
        assert ("win_rate" in row) == (name != "sft")
    assert [row["grader"] for row in report["grading"]["graders"]] == ["sft-grader", "rl-grader"]
    assert {row["model"] for row in report["grading"]["rows"]} == set(rows) and "Best of k answers by the grades of rl-grader" in said
    assert "coin:puzzle 1/4/maj" in said and "the reward model prefer finds" in said
    page = (out / "report.html").read_text()
    assert "Stage by stage" in page and "coin:puzzle 1/4/maj" in page and "A longer context" not in page
    assert (report["gain"]["before"], report["gain"]["after"]) == ("sft", "rl-last")


def test_each_stage_started_from_what_the_recipe_says(r1: tuple[Path, str]) -> None:
    out, _ = r1

    def parents(stage: str) -> list[str]:
        [folder] = out.glob(f"[0-9][0-9]-{stage}")
        told = read_json(folder / "lineage.json")
        assert told is not None
        return [parent.partition("-")[2] for parent in told["parents"]]

    assert parents("sft-restart") == ["pretrain", "reject"] and parents("prefer") == ["sft-restart", "reject"]
    assert (
        parents("pretrain-student") == ["tokenizer"]
        and parents("rl-last") == ["rl-all", "prefer"]
        and parents("distil") == ["sft-traces", "rl-last"]
    )


def test_the_reward_model_pays_in_the_last_part(r1: tuple[Path, str]) -> None:
    """Rewards there are no longer multiples of what the rules pay (1, .1 and .1)."""
    [folder] = r1[0].glob("[0-9][0-9]-rl-last")
    traces = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    paid = [answer["reward"] for trace in traces for answer in trace["answers"]]
    assert paid and any(abs(10 * reward - round(10 * reward)) > 1e-3 for reward in paid)


def test_r1_zero_learns_from_a_base_that_knows_no_chat(tmp_path: Path) -> None:
    (tmp_path / "zero.toml").write_text(small("r1-zero"))
    code, said, err = forked.start(tmp_path, "run", tmp_path / "zero.toml", "--out", tmp_path / "run", "--set", "rl.steps=12").wait(200)
    assert code == 0 and "gain of rl over pretrain" in said, err
    rows = Metrics.read(tmp_path / "run" / "04-rl" / "metrics.jsonl")
    assert len(rows) == 12 and all(row.get("gap_max", 0.0) < 1e-4 for row in rows)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["gain"]["before"] == "pretrain" and report["protocols"][0]["model"] == "rl"
    assert [row["name"] for row in report["stages"] if row["accuracy"] is not None] == ["pretrain", "rl"]
