"""A grader is a chain like any other: examples of grading, then reinforcement by whether the grade is the true one."""

import json
import re
from pathlib import Path

import forked
import pytest

from pascaline.data import puzzles
from pascaline.errors import BadInput
from pascaline.post.check import check
from pascaline.post.sft import puzzle_chats
from pascaline.recipe import load
from pascaline.runs import Metrics, read_json

COIN = Path(__file__).parent.parent / "coin.toml"
GRADE = "grade:coin:puzzle"
CHAIN = {
    "chain": ["sft", "sft-grader", "rl-grader"],
    f"puzzles.{GRADE}.examples": 600,
    "sft.puzzles": ["coin:puzzle"],
    "sft-grader.start": "pretrain",
    "sft-grader.puzzles": [GRADE],
    "rl-grader.puzzles": [GRADE],
}
SIZES = {
    **{f"sft-grader.{k}": v for k, v in {"epochs": 6.0, "sequence_length": 64, "tokens_per_step": 1024, "lr": 1e-2, "warmup": 2}.items()},
    **{
        f"rl-grader.{k}": v
        for k, v in {"steps": 3, "prompts": 8, "samples": 4, "max_tokens": 16, "sequence_length": 64, "lr": 4e-3}.items()
    },
    "sft.epochs": 1.0,
    "eval.puzzles": ["coin:puzzle", GRADE],
    "eval.problems": 16,
    "eval.votes": 2,
    "pretrain.tokens": 4096,
    "eval.samples": 1,
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graded")
    given = [text for k, v in {**CHAIN, **SIZES}.items() for text in ("--set", f"{k}={v if isinstance(v, str) else json.dumps(v)}")]
    code, out, err = forked.call(folder, "run", COIN, "--out", folder / "run", *given)
    assert code == 0, err
    (folder / "printed").write_text(out)
    return folder / "run"


def test_a_chain_trains_a_grader_and_measures_it(graded: Path) -> None:
    report = read_json(graded / "report.json") or {}
    assert {row["stage"] for row in report["table"]["rows"]} <= {"sft"}  # a grader answers other questions
    assert [(row["grader"], row["puzzle"]) for row in report["grading"]["graders"]] == [
        ("sft-grader", "coin:puzzle"), ("rl-grader", "coin:puzzle"),
    ]  # fmt: skip
    assert "grade:coin:puzzle" in (graded.parent / "printed").read_text()
    assert GRADE in (graded / "report.html").read_text()


def test_each_sft_stage_learns_the_examples_of_its_own_puzzles(graded: Path) -> None:
    recipe = load(graded / "recipe.toml")
    told = {name: read_json(next(graded.glob(f"*-{name}")) / "data.json") or {} for name in ("sft", "sft-grader")}
    assert {name: row["chats"] for name, row in told.items()} == {"sft": 400, "sft-grader": 600}
    assert list(recipe.taught("sft-grader")) == [GRADE] and list(recipe.taught("sft")) == ["coin:puzzle"]
    chats = list(puzzle_chats(recipe.taught("sft-grader"), recipe.seed))
    assert all(chat.messages[0]["content"].startswith("Grade this.\nCoin ") for chat in chats)
    assert all(re.fullmatch(r"right|odd [13579]", chat.messages[1]["content"]) for chat in chats)


def test_reinforcement_pays_for_the_true_grade_alone(graded: Path) -> None:
    folder = next(graded.glob("*-rl-grader"))
    rows = [json.loads(line) for line in (folder / "traces.jsonl").read_text().splitlines()]
    assert rows and Metrics.read(folder / "metrics.jsonl")[-1]["reward"] > 0
    assert {one["verdict"] for row in rows for one in row["answers"]} == {"right", "wrong"}
    for row in rows:
        shown = re.fullmatch(r"Grade this\.\nCoin [0-9]+\?\nAnswer: ([0-9])", row["prompt"])
        assert shown is not None
        true = "right" if int(shown[1]) % 2 == 0 else f"odd {shown[1]}"
        assert all((one["verdict"] == "right") == (one["answer"] == true) for one in row["answers"]), row


def test_unknown_puzzles_of_sft_are_refused_before_anything_starts() -> None:
    with pytest.raises(
        BadInput, match=r"sft-grader.puzzles = \['grade:coin:puzle'\] must name puzzles of the recipe .*did you mean 'grade:coin:puz"
    ):
        check(load(COIN, {**CHAIN, "sft-grader.puzzles": ["grade:coin:puzle"]}))
    with pytest.raises(BadInput, match="sft has nothing to learn from"):
        check(load(COIN, {**CHAIN, f"puzzles.{GRADE}.examples": 0, "sft.puzzles": [GRADE]}))
    with pytest.raises(BadInput, match=r"rl-grader\.puzzles"):
        check(load(COIN, {**CHAIN, "rl-grader.puzzles": []}))
    with pytest.raises(BadInput, match="grade:arithmetic': attempts at 'arithmetic' cannot be graded"):
        check(load(COIN, {"puzzles.grade:arithmetic.examples": 5}))
    check(load(COIN, CHAIN))


def test_a_table_names_a_grader_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(COIN.read_text() + '\n[puzzles."grade:chain"]\nexamples = 8\ndials = { steps = 2 }\nquality = { slip = 0.1 }\n')
    recipe = load(path)
    check(recipe)
    assert list(recipe.taught("sft")) == ["coin:puzzle", "grade:chain"]  # none named: all
    chats = [chat for chat in puzzle_chats(recipe.puzzles, 1) if "grade" in chat.name]
    assert len(chats) == 8 and puzzles.get("grade:chain").LEVELS == puzzles.get("chain").LEVELS
    path.write_text(path.read_text().replace("slip", "slop"))
    with pytest.raises(BadInput, match=r"puzzles.grade:chain.quality.slop is not a known key; did you mean 'slip'"):
        check(load(path))
