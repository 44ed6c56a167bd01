import copy
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from pascaline.eval import plots, trial
from pascaline.eval.forms import clock, flops
from pascaline.eval.report import report_html, table_text

HOSTILE = '6*2=12?no\n</pre></details><script>alert("x")</script><img src=x onerror=alert(1)> {{ 7*7 }} & 3<4'


def fake_report() -> dict[str, Any]:
    """Numbers of the size that the prototype gave."""

    def row(name: str, accuracy: float | None, seconds: float, work: float | None) -> dict[str, Any]:
        low, high = (None, None) if accuracy is None else (accuracy - 0.027, accuracy + 0.027)
        measured = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
        sizes = {
            "n": None if accuracy is None else 1000,
            "mean_tokens": None if accuracy is None else 88 + 100 * accuracy,
        }
        return {"name": name, **measured, **sizes, "seconds": seconds, "flops": work}

    protocols = [
        {"model": model, "temperature": temperature, "top_p": top_p, "samples": samples, "accuracy": accuracy}
        | {"accuracy_low": accuracy - 0.026, "accuracy_high": accuracy + 0.026, "n": 1000, "mean_tokens": 101.24}
        | {"abstain": 0.21 - accuracy / 5, "false_claim": 0.3 * (1 - accuracy), "truncated": 0.02}
        for model, base in (("sft", 0.441), ("rl", 0.652))
        for temperature, top_p, samples, accuracy in (
            (0.0, 1.0, 1, base),
            (0.6, 0.95, 4, base - 0.01),
            (1.0, 1.0, 4, base - 0.06),
        )
    ]
    ks = [1, 2, 4, 8, 16, 32]
    thought = "6*13=78,78-6=72,12?no\n13-6=7,7+6=13,12?no\n6/6=1,13-1=12,12?yes"
    return {
        "recipe": "recipes/laptop.toml",
        "seed": 1,
        "versions": {"python": "3.11.2", "pascaline": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "machine": {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 23.5, "accelerator": None},
        "stages": [
            row("corpus", None, 21.4, None),
            row("tokenizer", None, 4.2, None),
            row("pretrain", 0.214, 251.0, 3.61e13),
            row("sft", 0.431, 62.0, 6.1e12),
            row("rl", 0.642, 221.0, 2.2e13),
            row("eval", None, 74.0, 4.4e12),
        ],
        "protocols": protocols,
        "majority": [{"k": k, "accuracy": 0.642 + 0.03 * math.log2(k), "before": 0.43 + 0.02 * math.log2(k)} for k in ks],
        "best_of": [{"k": k, "accuracy": 1 - 0.358 * 0.8 ** math.log2(k), "before": 1 - 0.57 * 0.72 ** math.log2(k)} for k in ks],
        "examples": [
            {
                "prompt": "Make 12 from 6, 6, 13.",
                "before": {"thought": HOSTILE, "answer": "6+6<script>", "verdict": "wrong"},
                "after": {"thought": thought, "answer": "13-(6/6)", "verdict": "right"},
            },
            {
                "prompt": "Make 9 from 2, 7, 14, 3.",
                "before": {"thought": "14/7=2,2*2=4,9?no\n" * 30, "answer": "none", "verdict": "abstain"},
                "after": {"thought": "14/7=2,2*3=6,9?no", "answer": "7+2", "verdict": "wrong"},
            },
        ],
        "gain": {"points": 21.1, "low": 18.0, "high": 24.2},
    }


def fake_curves() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)

    def load(step: int, steps: int) -> list[list[float]]:
        return rng.dirichlet(np.full(16, 3 + 200 * step / steps), 5).tolist()

    def common(step: int, steps: int) -> dict[str, Any]:
        spent = {"tokens": 4096, "lr": 3e-3, "grad_norm": 1.0, "tokens_per_s": 9000.0}
        return {"step": step, **spent, "expert_load": load(step, steps), "max_violation": 2 / (1 + step / 30)}

    def rl(step: int) -> dict[str, Any]:
        skill = 0.43 + 0.22 * (1 - math.exp(-step / 60)) + rng.normal(0, 0.04)
        flat = {"flat_groups": 0.5 - 0.2 * skill, "all_right": 0.2 * skill, "none_right": 0.5 - 0.4 * skill}
        ends = {"wrong": 0.75 * (1 - skill), "abstain": 0.25 * (1 - skill), "unjudged": 0.0, "truncated": abs(rng.normal(0, 0.01))}
        seen = {"response_tokens": 120.0, "tokens_right": 110 + 30 * skill, "tokens_wrong": None if step % 9 == 0 else 140 - 20 * skill}
        policy = {"entropy": 0.4 * math.exp(-step / 150), "ratio": 1.0, "clipped": 0.0, "mismatch": 1e-7, "gap_max": 1e-5}
        times = {"rollout_seconds": 2.0, "verify_seconds": 0.1, "update_seconds": 1.0, "other": 0.02}
        speeds = {"rollout_tokens_per_s": 9000.0, "update_tokens_per_s": 4000.0}
        return {"reward": skill - 0.05, "accuracy": skill, **flat, **ends, **seen, **policy, **times, **speeds}

    return {
        "pretrain": [
            common(s, 900) | {"loss": 1.1 + 5 * math.exp(-s / 80) + rng.normal(0, 0.05) if s != 5 else None} for s in range(1, 901)
        ],
        "sft": [common(s, 150) | {"loss": 0.5 + math.exp(-s / 20) + rng.normal(0, 0.02)} for s in range(1, 151)],
        "rl": [common(s, 200) | {"loss": rng.normal(0, 0.01)} | rl(s) for s in range(1, 201)],
    }


def fake_traces() -> list[dict[str, Any]]:
    def said(verdict: str, thought: str) -> dict[str, Any]:
        return {"thought": thought, "answer": "13-(6/6)<b>", "verdict": verdict, "reward": -0.25, "tokens": 1234, "cut": verdict == "wrong"}

    answers = [said("right", HOSTILE), said("wrong", "x" * 10_000), said("abstain", "")]
    return [{"step": step, "puzzle": "count<i>down", "prompt": HOSTILE, "answers": answers} for step in range(0, 101, 10)]


TRIAL = 12  # drawings of a stage of reinforcement without a reference


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(fake_report(), fake_curves(), {"rl": fake_traces()})


class Structure(HTMLParser):
    VOID = ("meta", "br", "img", "input", "hr", "link")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.ids: list[str] = []
        self.refs: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.refs += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        self.refs += [f"#{name}" for _, value in attrs for name in re.findall(r"url\(#([^)]*)\)", value or "")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_whole_and_stands_alone(page: str) -> None:
    seen = Structure(page)
    assert seen.open == []
    assert seen.seen.count("svg") == 2 + TRIAL + 2 + 3
    assert "script" not in seen.seen and "link" not in seen.seen and "img" not in seen.seen
    assert len(seen.ids) == len(set(seen.ids))
    assert all(ref.startswith("#") and ref[1:] in seen.ids for ref in seen.refs)
    assert "@import" not in page and "url(http" not in page
    assert not re.search("#01020[0-9]", page), "a stand-in colour was left"
    assert len(page) < 1_500_000
    words = " ".join(seen.words)
    for expected in (
        "+21.1 points",
        "64.2%",
        "61.5% to 66.9%",
        "Learning by trial",
        "tokens (millions)",
        "AMD EPYC",
        "13-(6/6)",
    ):
        assert expected in words, expected


def test_model_text_is_shown_as_text(page: str) -> None:
    assert "<script" not in page and "onerror=alert(1)>" not in page
    assert HOSTILE in "".join(Structure(page).words)


def test_the_same_numbers_give_the_same_page(page: str) -> None:
    assert report_html(fake_report(), fake_curves(), {"rl": fake_traces()}) == page


def test_every_stage_of_reinforcement_has_its_own_section(page: str) -> None:
    report, curves = fake_report(), fake_curves()
    report["stages"] = [{"name": name} for name in ("sft", "rl", "reject", "sft-restart", "rl-all", "distil")]
    curves |= {"sft-restart": curves["sft"], "reject": [], "distil": curves["sft"]}
    curves["rl-all"] = [row | {"reference_kl": 0.1, "ratio_max": 1.5} for row in curves["rl"]]
    curves["rl-all"][7]["alarms"] = curves["rl-all"][9]["alarms"] = ["length"]
    seen = Structure(report_html(report, curves, {"rl-all": fake_traces()[:1]}))
    words = "".join(seen.words)
    assert seen.seen.count("svg") == 4 + TRIAL + (TRIAL + 1) + 2 + 4
    assert len(seen.ids) == len(set(seen.ids)) and seen.open == []
    for expected in ("Learning by trial: rl", "Learning by trial: rl-all", "KL to the reference (rl-all)",
                     "Fine-tuning loss (assistant tokens): sft-restart", "Distillation loss", "length from step 8."):  # fmt: skip
        assert expected in words, expected
    assert words.count("Alarms (docs/post-training.md)") == 1 and words.count("trl#2703") == 2
    cells = ["sft", "rl", "reject", "sft-restart", "rl-all", "distil"]
    assert [word for word in seen.words if word in cells][: len(cells)] == cells
    assert [line.split()[0] for line in table_text(report).splitlines()[2:8]] == cells


def test_the_loss_of_reinforcement_comes_last(page: str) -> None:
    titles = [
        word for word in Structure(page).words if word in ("Reward and accuracy", "Entropy of the policy", "Where the time goes", "Loss")
    ]
    assert titles == ["Reward and accuracy", "Entropy of the policy", "Where the time goes", "Loss"]


def test_traces_are_shown_as_text_and_cut_to_a_pages_length(page: str) -> None:
    seen = Structure(page)
    words = "".join(seen.words)
    assert seen.seen.count("details") == 4 + 11 * (1 + 3)
    for expected in ("Step 40, count<i>down: right, wrong, abstain", "Reward -0.25, 1,234 tokens, cut off", "... (4000 more characters)"):
        assert expected in words, expected
    assert "<i>down" not in page and words.count(HOSTILE) == 1 + 11 * 2


def test_shares_lie_upon_each_other() -> None:
    rows: list[dict[str, Any]] = [{"step": s, "a": 0.25, "b": None if s == 3 else 0.75} for s in range(10)]
    svg = plots.shares([*rows, {}], {"a": "some", "b": "more", "c": "none"}, "share", "Shares")
    assert svg is not None and all(f">{name}<" in svg for name in ("some", "more", "none"))
    assert plots.shares([{"step": 1}], {"a": "some"}, "share", "Shares") is None and plots.shares([], {"a": "some"}, "share", "S") is None
    one = plots.shares(rows[:1], {"a": "some"}, "share", "Shares")
    assert one is not None


def test_the_shares_of_a_steps_time_add_up() -> None:
    (row,) = trial._times([{"step": 4, "rollout_seconds": 3.0, "verify_seconds": 1.0, "update_seconds": 4.0, "other": 0.2}, {"step": 5}])
    assert row == {"step": 4, "rollout": pytest.approx(0.3), "verify": pytest.approx(0.1), "update": pytest.approx(0.4), "other": 0.2}


def test_missing_pieces_are_left_out() -> None:
    report, curves = fake_report(), fake_curves()
    for key in ("majority", "best_of", "examples", "gain", "protocols"):
        del report[key]
    curves["rl"] = []
    del curves["sft"]
    report["stages"] = [{"name": "pretrain", "accuracy": 0.2}, {"name": "odd"}]
    page = report_html(report, curves)
    seen = Structure(page)
    assert seen.seen.count("svg") == 3
    for absent in (
        "Learning by trial",
        "More samples",
        "Before and after",
        "Ways of sampling",
        "points",
        "None",
        "Undefined",
    ):
        assert absent not in "".join(seen.words), absent
    assert table_text(report).splitlines()[2].split()[:3] == ["pretrain", "20.0%", "-"]
    assert Structure(report_html({}, {})).seen.count("svg") == 0
    assert table_text({}) == ""


def test_rows_with_gaps_and_odd_loads() -> None:
    curves: dict[str, list[dict[str, Any]]]
    curves = {"rl": [{"step": 1, "reward": None, "accuracy": float("nan")}, {"step": 2, "expert_load": [[]]}, {}]}
    assert Structure(report_html({}, curves)).seen.count("svg") == 0
    one = {"pretrain": [{"step": 1, "loss": 3.0, "expert_load": [[0.5, 0.5]]}]}
    assert Structure(report_html({}, one)).seen.count("svg") == 2


def test_long_and_large_runs_stay_light() -> None:
    rows = [{"step": s, "loss": 1.0 + 1 / (s + 1)} for s in range(50_000)]
    svg = plots.curve(rows, {"loss": "loss"}, "loss", "Loss")
    assert svg is not None and len(svg) < 100_000
    load = np.random.default_rng(0).dirichlet(np.ones(256), 58)
    svg = plots.expert_load([{"expert_load": load.tolist()}], "Load")
    assert svg is not None and len(svg) < 2_000_000


def test_tokens_add_up_along_the_axis() -> None:
    rows: list[dict[str, Any]] = [{"step": s, "tokens": 1_000_000, "loss": 1.0 + s} for s in range(7)]
    svg = plots.curve(rows, {"loss": "loss"}, "loss", "Loss", x="tokens")
    assert svg is not None and "tokens (millions)" in svg and ">7<" in svg
    svg = plots.curve([*rows, {"step": 7, "loss": 2.0}], {"loss": "loss"}, "loss", "Loss", x="tokens")
    assert svg is not None and "tokens" not in svg and ">step<" in svg


def test_smooth_is_a_mean_and_keeps_ends() -> None:
    x = np.arange(100.0)
    _, raw, mean = plots.smooth(x, np.full(100, 2.0), 0.1)
    assert np.allclose(raw, 2) and np.allclose(mean, 2)
    _, _, mean = plots.smooth(x, x, 0.1)
    assert np.allclose(mean[12:88], x[12:88])  # centred: no lag behind the raw line
    assert plots.smooth(np.array([np.nan]), np.array([1.0]), 0.1)[2].size == 0


def test_expert_load_is_relative_to_an_even_share() -> None:
    svg = plots.expert_load([{"expert_load": [[10, 10, 10, 30]]}], "Load")
    assert svg is not None
    assert "2.00" in svg and svg.count("0.67") == 3


def test_table() -> None:
    text = table_text(fake_report())
    lines = text.splitlines()
    assert lines[0].split() == ["stage", "accuracy", "95%", "interval", "n", "tokens", "time", "FLOPs"]
    assert lines[2].split() == ["corpus", "-", "-", "-", "-", "21.4", "s", "-"]
    assert lines[6].split() == [
        "rl",
        "64.2%",
        "61.5%",
        "to",
        "66.9%",
        "1,000",
        "152.2",
        "3",
        "min",
        "41",
        "s",
        "2.20e13",
    ]
    assert len({len(line) for line in lines[:2]}) == 1 and max(map(len, lines)) <= 110
    assert text.isascii() and "gain of rl over sft: +21.1 points (95% interval +18.0 to +24.2)" in text
    assert sum(line.startswith(("sft ", "rl ")) for line in lines) == 8


def test_forms() -> None:
    assert (clock(59.96), clock(59.9), clock(3599.7), clock(7385)) == (
        "1 min 00 s",
        "59.9 s",
        "1 h 00 min",
        "2 h 03 min",
    )
    assert (flops(2.2e13), flops(None), flops(0)) == ("2.20e13", "-", "-")
    report = copy.deepcopy(fake_report())
    report["gain"]["low"] = None
    assert "interval -)" in table_text(report)


def test_light_import() -> None:
    code = "import sys, pascaline.eval.report; assert not {'torch', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


if __name__ == "__main__":  # python tests/eval/test_report.py > /tmp/report.html, to look at it
    print(report_html(fake_report(), fake_curves(), {"rl": fake_traces()}))
    print(table_text(fake_report()), file=sys.stderr)
