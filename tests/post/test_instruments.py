"""What is told of a step of reinforcement: shares that add up, times, and answers to read, the same after a resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model

from pascaline.data.batch import batches
from pascaline.data.puzzles import Problem, Verdict
from pascaline.engine import Output
from pascaline.post import grpo, instruments
from pascaline.post.instruments import Clock, Traces
from pascaline.post.rollout import rl_sample
from pascaline.tables import Rl
from pascaline.train import losses, metrics
from pascaline.train.loop import Trainer
from pascaline.train.parallel import ALONE, Ranks

RIGHT, WRONG, ABSTAIN, UNJUDGED = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN, Verdict.UNJUDGED


def output(tokens: int, reason: str = "stop", text: str = "7") -> Output:
    return Output([0] * tokens, [-1.0] * tokens, reason, text, f"thought of {tokens}")


GROUPS = [
    ([output(2), output(4, "length")], [RIGHT, WRONG]),
    ([output(3), output(3)], [ABSTAIN, WRONG]),
    ([output(5), output(7)], [RIGHT, UNJUDGED]),
    ([output(1), output(9)], [RIGHT, RIGHT]),
]


def told(groups: list[tuple[list[Output], list[Verdict]]]) -> dict[str, Any]:
    outputs, verdicts = [g[0] for g in groups], [g[1] for g in groups]
    known = np.array([[v is not UNJUDGED for v in row] for row in verdicts])
    right = np.array([[v is RIGHT for v in row] for row in verdicts])
    cut = np.array([[o.finish_reason == "length" for o in row] for row in outputs])
    reward = grpo.rewards(verdicts, cut, -0.5)
    return instruments.facts(outputs, verdicts, reward, known, grpo.advantages(reward, right, known)[1])


def test_facts_by_hand() -> None:
    assert told(GROUPS) == {
        "reward": pytest.approx((1 + 0 + 0 - 0.5 + 1 + 1 + 1) / 7),
        "flat_groups": 0.75,
        "all_right": 0.5,  # the last, and the one whose only judged answer is right
        "none_right": 0.25,
        "response_tokens": 34 / 8,
        "tokens_right": 17 / 4,
        "tokens_wrong": 3.5,
        "truncated": 1 / 8,
        "accuracy": 4 / 8,
        "wrong": 2 / 8,
        "false_claim": 1 / 8,
        "abstain": 1 / 8,
        "unjudged": 1 / 8,
    }


def test_verdicts_and_kinds_of_flat_groups_add_up() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        verdicts = [[[RIGHT, WRONG, ABSTAIN, UNJUDGED][i] for i in draw.integers(4, size=3)] for _ in range(5)]
        found = told([([output(int(n) + 1) for n in draw.integers(9, size=3)], row) for row in verdicts])
        assert found["accuracy"] + found["wrong"] + found["abstain"] + found["unjudged"] == pytest.approx(1)
        assert found["all_right"] + found["none_right"] == pytest.approx(found["flat_groups"])


def test_a_mean_over_no_answers_is_no_number() -> None:
    """A zero would pass for answers of no length."""
    found = told([([output(2), output(4)], [WRONG, WRONG])])
    assert found["tokens_right"] is None and found["tokens_wrong"] == 3 and found["reward"] == -0.5
    assert told([([output(2)], [UNJUDGED])])["reward"] == 0


def test_the_clock_adds_up_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: now[0])
    clock = Clock()
    for what, seconds in (("rollout", 2.0), ("verify", 1.0), ("rollout", 3.0), ("update", 0.5)):
        with clock(what):
            now[0] += seconds
        now[0] += 10
    assert clock.taken() == {"rollout_seconds": 5.0, "verify_seconds": 1.0, "update_seconds": 0.5}
    assert clock.taken() == {"rollout_seconds": 0.0, "verify_seconds": 0.0}


def test_a_steps_time_is_shared_out() -> None:
    row = {"rollout_seconds": 6.0, "verify_seconds": 1.0, "update_seconds": 0.5, "rollout_tokens": 600, "tokens": 450}
    found = metrics.spent(row, 10.0, 2.0)
    assert found["other"] == pytest.approx(0.05) and found["update_seconds"] == 2.5
    assert found["rollout_tokens_per_s"] == 100 and found["update_tokens_per_s"] == 180
    again = metrics.spent({"rollout_seconds": 0.0, "tokens": 0}, 10.0, 9.0)  # a step on older samples: no rollout, no speed of one
    assert again["other"] == pytest.approx(0.1) and "rollout_tokens_per_s" not in again and "update_tokens_per_s" not in again


# ---- the row and the line


def test_what_is_misread_stands_last() -> None:
    row = {
        "step": 3,
        "loss": 0.0,
        "rl": 0.0,
        "lr": 1e-3,
        "entropy": 0.4,
        "flat_groups": 0.2,
        "reward": 0.5,
        "alarms": ["gap"],
        "gap_max": 1.0,
    }
    keys = list(metrics.ordered(row))
    assert keys[:6] == ["step", "alarms", "reward", "flat_groups", "entropy", "gap_max"] and keys[-2:] == ["rl", "loss"]
    assert list(metrics.shown(row)) == ["alarms", "reward", "flat_groups", "entropy", "gap_max", "loss"]
    plain = {"step": 3, "loss": 2.0, "lr": 1e-3, "tokens_per_s": 9.0}
    assert list(metrics.ordered(plain)) == list(plain) and next(iter(metrics.shown(plain))) == "loss"  # elsewhere the loss tells most


class Two(Ranks):
    """This rank, and one that has the numbers `other`."""

    other: Any = None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + type(self).other[0]

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.maximum(tensor, type(self).other[1])


def test_of_a_maximum_the_largest_counts_over_micro_batches_and_ranks() -> None:
    a, b = torch.tensor(2.0), torch.tensor(5.0)
    assert metrics.combined("gap_max", a, b) == metrics.combined("gap_max", b, a) == 5 and metrics.combined("ce", a, b) == 7
    values = {"ce": torch.tensor(1.0), "gap_max": torch.tensor(3.0), "load": torch.ones(2, 2)}
    Two.other = (torch.full((5,), 10.0), torch.tensor([4.0]))
    found = metrics.over_ranks(Two(), values)
    assert found["ce"] == 11 and found["gap_max"] == 4 and found["load"].tolist() == [[11, 11], [11, 11]]
    alone = metrics.over_ranks(ALONE, values)
    assert {name: value.tolist() for name, value in alone.items()} == {name: value.tolist() for name, value in values.items()}


def test_the_gap_of_a_step_is_the_largest_of_any_sampled_token(tmp_path: Path) -> None:
    """Of four micro-batches, one has a token whose log-probability the engine told wrongly by 0.25."""
    model = tiny_model(vocab_size=40)
    rng = np.random.default_rng(0)
    samples = []
    for k in range(4):
        prompt, said = rng.integers(3, 40, 3).tolist(), rng.integers(3, 40, 4).tolist()
        with torch.no_grad():
            logprob = model(torch.tensor([prompt + said]))[0, 2:-1].log_softmax(-1).gather(-1, torch.tensor(said)[:, None])[:, 0]
        wrong = np.array([0, 0, 0.25 * (k == 1), 0])
        samples.append(rl_sample(prompt, Output(said, (logprob.numpy() + wrong).tolist(), "stop"), 1.0 if k % 2 else -1.0))

    class Source:
        facts: dict[str, Any] = {"reward": 0.5, "rollout_seconds": 0.0}  # noqa: RUF012

        def step(self, step: int) -> Any:
            return batches(samples, 7, 1, 0)

        def documents(self, step: int) -> list[Any]:
            return [{} for _ in samples]

    assert len(Source().step(0)) == 4
    stage = Rl(sequence_length=8, guard={"sigma": 0.0, "patience": 0})
    Trainer(model, stage, losses.Loss(mtp_apart=True), tmp_path, "rl", torch.float32).run(Source(), 1, quiet=True)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["gap_max"] == pytest.approx(0.25, abs=1e-4) and row["mismatch"] == pytest.approx(0.25 / 16, abs=1e-4)
    assert next(iter(row)) == "step" and list(row)[1] == "reward" and list(row)[-1] == "loss" and 0 <= row["other"] < 1


# ---- traces


def kept(path: Path, steps: int, *calls: range) -> list[dict[str, Any]]:
    """traces.jsonl of a run whose processes worked at these steps."""
    for worked in calls:
        traces = Traces(path, steps)
        for step in worked:
            keep(traces, step)
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep(traces: Traces, step: int) -> None:
    problems = [Problem("coin", f"Coin {step} {g}?", f"{g}", {}) for g in range(len(GROUPS))]
    outputs, verdicts = [g[0] for g in GROUPS], [g[1] for g in GROUPS]
    traces.keep(step, problems, outputs, verdicts, np.arange(8.0).reshape(4, 2), np.array([False, True, True, True]))


@pytest.mark.parametrize(("steps", "expected"), [(101, list(range(0, 101, 10))), (3, [0, 1, 2]), (1, [0])])
def test_a_group_of_every_tenth_of_the_run_is_kept(steps: int, expected: list[int], tmp_path: Path) -> None:
    found = kept(tmp_path / "traces.jsonl", steps, range(steps))
    assert [line["step"] for line in found] == expected
    assert found[-1] == {
        "step": expected[-1],
        "puzzle": "coin",
        "prompt": f"Coin {expected[-1]} 0?",
        "answers": [
            {"thought": "thought of 2", "answer": "7", "verdict": "right", "reward": 0.0, "tokens": 2, "cut": False},
            {"thought": "thought of 4", "answer": "7", "verdict": "wrong", "reward": 1.0, "tokens": 4, "cut": True},
        ],
    }


def test_after_a_resume_nothing_stands_twice(tmp_path: Path) -> None:
    straight = kept(tmp_path / "straight.jsonl", 31, range(31))
    path = tmp_path / "killed.jsonl"
    kept(path, 31, range(22))
    with open(path, "a") as file:
        file.write('{"step": 24, "pro')  # torn
    assert kept(path, 31, range(14, 31)) == straight  # the last checkpoint was of step 14


def test_of_each_verdict_one_answer_comes_first(tmp_path: Path) -> None:
    traces = Traces(tmp_path / "traces.jsonl", 1)
    answers = [output(n) for n in range(1, 7)]
    verdicts = [WRONG, WRONG, WRONG, WRONG, ABSTAIN, RIGHT]
    traces.keep(0, [Problem("coin", "Coin?", "1", {})], [answers], [verdicts], np.zeros((1, 6)), np.array([True]))
    (line,) = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert [said["tokens"] for said in line["answers"]] == [1, 5, 6]


def test_a_full_disk_costs_the_trace_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> Callable[..., Any]:
        def append(row: Any) -> None:
            raise OSError(number, "no")

        return append

    traces = Traces(tmp_path / "traces.jsonl", 1)
    monkeypatch.setattr(traces.file, "append", full(28))
    keep(traces, 0)
    monkeypatch.setattr(traces.file, "append", full(13))
    with pytest.raises(OSError, match="no"):
        keep(traces, 0)
