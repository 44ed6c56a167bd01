"""The table of a chain: what stands in it, and how it is shown."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from pascaline.data.puzzles import Problem
from pascaline.engine import Output
from pascaline.eval import chaintable
from pascaline.post import evaluation, stagetable
from pascaline.post.evaluation import compared
from pascaline.post.stage import Run
from pascaline.recipe import parse
from pascaline.runs import read_json
from pascaline.train.loop import active_parameters

EVAL = {"puzzles": ["countdown", "chain"], "votes": 32, "vote_problems": 2, "temperature": 0.6}
RAW = {"chain": ["sft", "rl", "rl-more"], "rl-more": {}, "eval": EVAL}


def votes(worth: list[float], tokens: float = 10.0) -> dict:
    curve = {"k": [1, 2, 4, 8, 16, 32], "majority": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "best_of": [0.1, 0.3, 0.5, 0.7, 0.8, 0.9]}
    return {**curve, "format": 1.0, "language": 0.5, "mean_tokens": tokens, "worth": worth}


def parts() -> dict:
    found = {}
    for i, name in enumerate(("sft", "rl", "rl-more")):
        found |= {f"{name}.t0.6": {"accuracy": 0.1 * (i + 1)}, f"{name}.chain": {"accuracy": 0.2}}
        found |= {f"{name}.votes": votes([float(i), 1.0]), f"{name}.chain-votes": votes([0.0, 2.0 - i], 30.0)}
    return found


def test_a_row_a_stage_with_wins_against_the_first() -> None:
    cost = [{"name": name, "seconds": 3.0, "flops": 1e9} for name in ("pretrain", "sft", "rl", "rl-more")]
    found = stagetable.table(parse(RAW, ""), parts())
    assert (found["k"], found["against"], found["judge"]) == (16, "sft", None)
    first, middle, last = found["rows"]
    assert "win_rate" not in first and first["puzzles"]["countdown"] == {"pass_1": 0.1, "pass_k": 0.8, "maj_k": 0.5}
    # rl: more on the first problem, as much on the second; as much on the third, less on the fourth
    assert middle["win_rate"] == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert last["stage"] == "rl-more" and last["mean_tokens"] == 20.0 and last["win_low"] < last["win_rate"]
    [(note, (head, *rows))] = chaintable.tables({"table": found, "stages": cost})
    assert len(rows) == 3 and all(len(row) == len(head) for row in rows)
    assert rows[0][:2] == ["sft", "10.0 / 80.0 / 50.0"] and rows[0][-2] == "3.0 s"
    assert "the verifier finds" in note and "that of sft" in note


def test_what_the_judge_reads_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem's first answer, with its prompt, beside what the engine samples."""
    tokenizer, small = tiny_tokenizer(), tiny_model(model_type="qwen3")
    engine = SimpleNamespace(tokenizer=tokenizer, model=tiny_model(), stats=SimpleNamespace(generated=0, prefilled=0))
    problems = [Problem("chain", "hi", "", {}), Problem("chain", "what?", "", {})]
    answers = [[Output([3] * n, [0.0] * n, "stop", "x", None) for n in lengths] for lengths in ((4, 9), (2, 8))]
    judge = SimpleNamespace(model=small, scores=lambda chats: [float(len(chat)) for chat in chats])
    lengths = [len(tokenizer.prompt_ids("hi")) + 4, len(tokenizer.prompt_ids("what?")) + 2]

    def work(own: Any) -> dict[str, Any]:
        own.stats.generated += 23
        return stagetable.measured(own, SimpleNamespace(problems=problems, outputs=answers), judge)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "Engine", lambda *_: engine)
    monkeypatch.setattr(evaluation.hf, "load", lambda *_: None)
    bare = Run(parse({}, ""), tmp_path, torch.device("cpu"), torch.float32, quiet=True)
    monkeypatch.setattr(Run, "tokenizer", lambda self: tokenizer)
    evaluation._work(bare, [("sft", "votes", work)])
    [part] = (read_json(path) or {} for path in tmp_path.rglob("votes.json"))
    active = sum(p.numel() for p in small.parameters()) - 61 * 24
    assert part["worth"] == lengths and part["tokens"] == 23 and "judge_flops" not in part
    assert part["flops"] == 2 * (23 * active_parameters(engine.model) + sum(lengths) * active)


def test_one_stage_has_nothing_to_be_compared_with() -> None:
    assert chaintable.tables({}) == [] and chaintable.tables({"table": {"rows": [{}]}}) == []


def test_the_gain_is_of_the_last_model_that_rl_made() -> None:
    assert compared(parse({}, "")) == ("sft", "rl")
    assert compared(parse(RAW, "")) == ("sft", "rl-more")
    assert compared(parse({**RAW, "rl-more": {"start": "sft"}}, "")) == ("sft", "rl-more")
    assert compared(parse({"chain": ["sft"]}, "")) == (None, "sft")
    assert compared(parse({"chain": ["rl"], "rl": {"plain": True}}, "")) == ("pretrain", "rl")
    student = {"chain": ["sft", "rl", "pretrain-student", "sft-student"], "pretrain-student": {}, "sft-student": {}}
    assert compared(parse(student, "")) == ("sft", "rl")


def test_a_stage_and_a_puzzle_may_share_a_name() -> None:
    """[rl-chain] on the first puzzle is not [rl] on the puzzle chain."""
    raw = {"chain": ["sft", "rl", "rl-chain"], "rl-chain": {}, "eval": EVAL}
    found = parts()
    for name in [name for name in found if name.startswith("rl-more.")]:
        found[name.replace("rl-more.", "rl-chain.")] = found.pop(name)
    rows = stagetable.table(parse(raw, ""), found)["rows"]
    assert [row["mean_tokens"] for row in rows] == [20.0] * 3 and rows[2]["puzzles"]["countdown"]["pass_1"] == pytest.approx(0.3)
