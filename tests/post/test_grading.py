"""The best of n by a trained verifier, against the majority at equal tokens."""

import json
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import graded
import numpy as np
import pytest
import tiny
import torch

import pascaline
from pascaline.data import puzzles
from pascaline.data.puzzles import Problem, Verdict, grade
from pascaline.engine import Engine, Output, Sampling
from pascaline.engine.vote import vote
from pascaline.errors import BadInput
from pascaline.eval import gradetable, passk
from pascaline.eval.report import report_html, table_text
from pascaline.eval.tasks import Result
from pascaline.post import grading, stagetable
from pascaline.post.check import check
from pascaline.post.grading import Grade, Grader
from pascaline.recipe import load, parse
from pascaline.runs import read_json
from pascaline.tables import GRADE

COIN = Path(__file__).parent.parent / "coin.toml"
EVAL = {"puzzles": ["coin:puzzle"], "grader": "sft-grader"}
RAW: dict[str, Any] = {
    "chain": ["sft", "sft-grader"],
    "sft-grader": {"start": "sft", "puzzles": [graded.NAME]},
    "puzzles": {"coin:puzzle": {"examples": 4}, graded.NAME: {"examples": 4}},
    "eval": EVAL,
}


@pytest.fixture(autouse=True)
def coins_can_be_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(puzzles.BUILT_IN, graded.NAME, graded.Graded())
    monkeypatch.setattr(grade, "ask", graded.ask)
    puzzles.get.cache_clear()


class Oracle:
    """A grader that says and scores what it is told, each grade costing `each` tokens."""

    def __init__(self, score: Any, each: int = 10):
        self.score, self.each, self.asked = score, each, 0

    def grades(self, problems: list[Problem]) -> list[Grade]:
        self.asked += len(problems)
        scores = [self.score(graded.Graded().solve(p) == "right") for p in problems]
        said = ["right" if s >= 0.5 else "line 1" for s in scores]
        return [Grade(p, Output([], [], "stop", word), s, self.each) for p, word, s in zip(problems, said, scores, strict=True)]


def result(answers: list[list[str]], length: int = 5, apart: bool = True) -> Result:
    """Answers to the coin, "" for one that was cut off; apart: each with a thought of its own."""
    asked = [Problem("coin:puzzle", f"Coin {i}?", f"coin {i}", {}) for i in range(len(answers))]
    outputs = [[Output([0] * length, [], "stop" if a else "length", a, f"toss {j}" * apart) for j, a in enumerate(row)] for row in answers]
    verdicts = [[Verdict.RIGHT if a and a in "02468" else Verdict.WRONG for a in row] for row in answers]
    return Result(asked, outputs, verdicts)


ANSWERS = [["0", "1", "1", "3"], ["2", "2", "2", "5"], ["1", "3", "5", "7"], ["4", "1", "4", "4"]]


def best_of(grader: Any, answers: list[list[str]] = ANSWERS, apart: bool = True) -> dict[str, Any]:
    found = grading.best_of(result(answers, 5, apart), [7] * len(answers), grader, [1, 2, 4])
    assert json.loads(json.dumps(found)) == found
    return found


def curve(found: dict[str, Any], which: str = "points") -> list[float]:
    return [point["accuracy"] for point in found[which]]


def test_a_perfect_grader_finds_what_is_there_and_a_constant_one_nothing() -> None:
    right = result(ANSWERS).right
    perfect = best_of(Oracle(float))
    assert curve(perfect) == pytest.approx([float(passk.pass_at_k(4, right.sum(1), k).mean()) for k in (1, 2, 4)])
    assert (perfect["real"], perfect["verdict"], perfect["named"], perfect["brier"], perfect["auc"]) == (1, 1, 1, 0, 1)
    constant = best_of(Oracle(lambda fine: 0.5))
    assert curve(constant) == pytest.approx([right.mean()] * 3) and constant["auc"] == 0.5 and constant["brier"] == 0.25
    assert constant["real"] == constant["sound"] == right.mean() and constant["named"] == 0.0  # "right" for all
    contrary = best_of(Oracle(lambda fine: 1.0 - fine))
    worst = [fmean(min(s) for row in right.tolist() for s in combinations(row, k)) for k in (1, 2, 4)]
    assert curve(contrary) == pytest.approx(worst) and contrary["verdict"] == contrary["auc"] == 0.0


def test_equal_tokens_by_hand() -> None:
    """Prompts of 7 tokens, answers of 5, grades of 10: k answers cost 7 + 15 k, m without grades 7 + 5 m."""
    found = best_of(Oracle(float))
    assert [p["tokens"] for p in found["points"]] == [22, 37, 67] and [p["tokens"] for p in found["majority"]] == [12, 17, 22, 27]
    assert (found["k"], found["m"], found["answer_tokens"], found["grade_tokens"]) == (1, 3, 5, 10)  # 4 answers: 27 > 22
    assert found["best_k"] == found["pass_1"] and "over_once" not in found and "over_majority" in found
    cheap = best_of(Oracle(float, each=5))
    assert (cheap["k"], cheap["m"]) == (2, 4) and [p["k"] for p in cheap["majority"]] == [1, 2, 4]
    r = result(ANSWERS)
    best, most = passk.pass_at_k(4, r.right.sum(1), 2), passk.majority_by_problem(r.ballots(), r.right.tolist(), 4)
    gain = cheap["over_majority"]
    assert (gain["gain"], gain["low"], gain["high"]) == pytest.approx(passk.paired_difference(best, most))
    assert cheap["over_once"]["gain"] == pytest.approx(best.mean() - r.right.mean())
    assert cheap["majority_over_once"]["gain"] == pytest.approx(most.mean() - r.right.mean())
    dear = best_of(Oracle(float, each=20))
    assert dear["k"] is None and "over_majority" not in dear and len(dear["points"]) == 3
    assert [grading.affordable(2, 5, extra) for extra in (0, 4.9, 5, 10)] == [2, 2, 3, 4]
    assert grading.affordable(3, 0.1, 0.3) == 6  # 0.3 / 0.1 is less than 3 in floating point


def test_what_is_asked_twice_is_graded_once() -> None:
    """Two answers, each said twice: of 2 answers either is among them in 5 of 6 cases."""
    found = best_of(Oracle(float), [["2", "2", "5", "5"]], apart=False)
    assert [p["tokens"] for p in found["points"]] == pytest.approx([7 + 5 + 10, 7 + 10 + 2 * 10 * 5 / 6, 7 + 20 + 20])
    assert found["attempts"] == 4 and found["grade_tokens"] == 10


def test_an_answer_without_a_vote_is_not_graded_and_is_chosen_last() -> None:
    oracle = Oracle(lambda fine: 0.0)
    found = best_of(oracle, [["", "", "", "2"], ["", "", "", ""]])
    assert oracle.asked == found["attempts"] == 1 and curve(found) == pytest.approx([1 / 8, 1 / 4, 3 / 8, 1 / 2])
    none = best_of(oracle, [["", "", "", ""]] * 2)
    assert (none["attempts"], none["real"], none["auc"], none["grade_tokens"]) == (0, None, None, None) and set(curve(none)) == {0.0}


def test_quality_counts_problems_and_missing_grades() -> None:
    asked = [graded.ask(Problem("coin:puzzle", "?", str(i), {}), "toss", a) for i, a in enumerate("0113")]
    said = [Output([], [], "stop", "right"), Output([], [], "stop", "line 2"), Output([], [], "length", "line 1"), None]
    found = grading.quality([Grade(p, o, s, 1) for p, o, s in zip(asked, said, (0.9, 0.4, 0.0, 0.0), strict=True)], [0, 1, 1, 1])
    assert found["attempts"] == 4 and found["real"] == pytest.approx(0.5)  # problem 0: all, problem 1: none
    assert (found["verdict"], found["named"], found["sound"], found["missing"]) == (0.5, 0.0, 0.25, 0.5)
    assert found["brier"] == pytest.approx((0.01 + 0.16) / 4)


# ---- with an engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    own = tiny.tiny_tokenizer()
    return Engine(tiny.talker(own, closes=0.5, ends=2.0), own)


def test_the_score_is_the_probability_of_right_behind_the_own_thought(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here sampled, for a random model's greedy answers never end."""
    monkeypatch.setattr(grading, "Sampling", lambda temperature, *rest, **more: Sampling(1.0, *rest, **more))
    own = engine.tokenizer
    assert own is not None
    asked = [Problem(graded.NAME, f"Grade {i}", str(i), {"answer": "1"}) for i in range(200)]
    found = Grader(lambda: engine, 24).grades(asked)
    words = [i for i in range(own.vocab_size) if own.decode([i]).strip() and "right".startswith(own.decode([i]).strip())]
    assert {own.decode([i]).strip() for i in words} >= {"r"}
    checked = 0
    for given in found:
        prompt = own.prompt_ids(given.problem.prompt)
        assert given.output is not None and given.tokens == len(prompt) + len(given.output.token_ids)
        if given.said is None:
            assert given.score == 0.0
            continue
        said = given.output.token_ids
        first = next(i for i in range(len(said)) if (own.thought(prompt, said[: i + 1])[1] or "").strip())
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + said[:first]]))[0, -1].float()
        likely = set(logits.topk(grading.TOP).indices.tolist())
        p = logits.softmax(-1)
        assert given.score == pytest.approx(float(sum(p[i] for i in words if i in likely)), rel=1e-3)
        checked += given.score > 0
    assert checked >= 5


def test_a_grader_is_a_judge_for_the_engines_best_of_n(engine: Engine) -> None:
    problem, grader = Problem("coin:puzzle", "Coin 3?", "coin 3", {}), Grader(lambda: engine, 24)
    found = vote(engine, problem.prompt, Sampling(1.0, 1.0, 16, seed=3), k=6, judge=lambda _, output: grader.score(problem, output))
    assert found.winner is found.outputs[int(np.argmax(found.scores))] and all(0 <= s <= 1 for s in found.scores)


def test_an_attempt_without_room_has_no_grade() -> None:
    own = tiny.tiny_tokenizer()
    small = Engine(tiny.talker(own, max_position_embeddings=32), own)
    long, short = (Problem(graded.NAME, text, text, {"answer": "0"}) for text in ("word " * 40, "?"))
    first, second = Grader(lambda: small, 8).grades([long, short])
    assert first.output is None and first.said is None and (first.score, first.tokens) == (0.0, 0)
    assert second.output is not None and second.tokens > 0
    assert grading.quality([first], [0])["missing"] == 1.0


# ---- in a chain ------------------------------------------------------------------------------------------------------


def test_a_grader_stands_apart_from_what_answers() -> None:
    assert GRADE == grade.PREFIX
    recipe = parse(RAW, "")
    assert (recipe.talkers, recipe.graders, recipe.attempts) == (("sft",), ("sft-grader",), (graded.NAME,))
    both = parse({**RAW, "sft-grader": {"puzzles": [graded.NAME, "coin:puzzle"]}}, "")
    assert both.talkers == ("sft", "sft-grader") and both.graders == both.attempts == ()
    alone = parse({**RAW, "eval": {"puzzles": [graded.NAME]}}, "")  # grading is all that is asked for
    assert alone.talkers == ("sft", "sft-grader") and alone.graders == ()
    only = parse({**RAW, "sft": {"puzzles": [graded.NAME]}}, "")  # nobody else would be left
    assert only.talkers == ("sft", "sft-grader") and only.graders == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eval": {**EVAL, "grader": "sft-grade"}}, r"eval\.grader = 'sft-grade' is no stage.*\(sft, sft-grader\)"),
        ({"eval": {"puzzles": [graded.NAME], "grader": "sft"}}, r"nothing to grade: .* none of eval\.puzzles \(grade:coin:puzzle\)"),
        ({"chain": ["sft", "sft-grader", "rl"], "rl": {"puzzles": ["coin:puzzle"], "start": "pretrain", "plain": True},
          "eval": {**EVAL, "grader": "rl"}}, "knows plain text only"),
    ],
)  # fmt: skip
def test_a_grader_that_cannot_grade_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        check(parse({**RAW, **change}, ""))


SETTINGS = {
    "chain": ["sft", "sft-grader"],
    "corpus.max_bytes": 2_000,
    "puzzles.grade:coin:puzzle.examples": 600,
    "pretrain.tokens": 4096,
    "sft.epochs": 1.0,
    "sft-grader": {**RAW["sft-grader"], "epochs": 6.0, "sequence_length": 64, "tokens_per_step": 1024, "lr": 1e-2, "warmup": 2},
    "eval": {**EVAL, "problems": 32, "samples": 1, "votes": 8, "vote_problems": 16, "max_tokens": 24},
}


def told(out: Path) -> dict[str, Any]:
    """report.json without times."""
    report = read_json(out / "report.json")
    assert report is not None
    rows = [{**row, "seconds": None} for row in report["stages"]]
    return {**report, "stages": rows, "ledger": None}


def test_the_whole_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    report = pascaline.run(COIN, out, SETTINGS, quiet=True)
    (own,), (row,) = report["grading"]["graders"], report["grading"]["rows"]
    assert (own["grader"], own["puzzle"], own["attempts"]) == ("sft-grader", "coin:puzzle", 32)
    assert own["real"] > 0.5 and own["missing"] < 0.2, own  # 1.0 was seen; how well it learns is not the matter here
    assert (row["model"], row["puzzle"], row["n"]) == ("sft", "coin:puzzle", 16) and row["points"][-1]["k"] == 8
    spent = {which: {p["k"]: p["tokens"] for p in row[which]} for which in ("points", "majority")}
    assert row["k"] is None or spent["majority"][row["m"]] <= spent["points"][row["k"]] < spent["majority"][row["m"]] + row["answer_tokens"]
    assert [r["stage"] for r in report["table"]["rows"]] == ["sft"]
    assert (out / "model" / "model.safetensors").read_bytes() == next(out.glob("*-sft/model/model.safetensors")).read_bytes()
    text, page = table_text(report), report_html(report, {})
    assert "best - majority" in text and "sft-grader" in text and "Best of n by a trained verifier" in page and "Votes and grades" in page
    # The grader's work counts in the cost, and a part that is made anew is the same.
    parts = next(out.glob("*-eval")) / "parts"
    part = parts / "sft.votes.json"
    votes = read_json(part)
    assert votes is not None and votes["flops"] > 0 and "beside" not in votes
    assert votes["tokens"] > row["answer_tokens"] * 8 * 16
    before = told(out)
    for path in (part, parts / f"sft-grader.{graded.NAME}.json", parts.parent / "done.json", out / "done.json", out / "report.json"):
        path.unlink()
    pascaline.run(COIN, out, SETTINGS, quiet=True)
    assert told(out) == before and load(out / "recipe.toml").eval.grader == "sft-grader"


def test_without_a_grader_nothing_is_told() -> None:
    assert stagetable.graded(parse({}, ""), {f"{name}.votes": {} for name in ("sft", "rl")}) == {} and gradetable.tables({}) == []
