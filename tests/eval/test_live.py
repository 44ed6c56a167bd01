"""How far a run is, told from a folder that is still being written."""

import json
import shutil
from pathlib import Path

import forked
import pytest

from pascaline.eval.live import draw, standing, standing_text
from pascaline.runs import Metrics


@pytest.fixture
def half(coin_run: Path, tmp_path: Path) -> Path:
    """The coin run as it was in the middle of sft."""
    out = tmp_path / "run"
    shutil.copytree(coin_run, out)
    for name in ("05-rl", "06-eval", "model"):
        shutil.rmtree(out / name)
    for file in ("report.json", "report.html", "done.json", "04-sft/done.json"):
        (out / file).unlink()
    Metrics(out / "04-sft" / "metrics.jsonl").truncate_after(2)
    with open(out / "04-sft" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0, "guard": "loss spike", "tokens": 7}\n{"step": 4, "lo')
    return out


def test_each_stage_that_has_begun(half: Path) -> None:
    pretrain, sft = standing(half)
    rows = Metrics.read(half / "03-pretrain" / "metrics.jsonl")
    assert (pretrain["name"], pretrain["done"], pretrain["steps"]) == ("pretrain", True, len(rows))
    assert pretrain["tokens"] == sum(row["tokens"] for row in rows) and pretrain["guard"] == {}
    assert pretrain["loss"] == pytest.approx(sum(row["loss"] for row in rows[-20:]) / len(rows[-20:]))
    assert (sft["done"], sft["steps"], sft["guard"]) == (False, 4, {"loss spike": 1}) and sft["reward"] is None


def test_the_command_shows_it_and_draws_the_page(half: Path, tmp_path: Path) -> None:
    code, out, err = forked.call(tmp_path, "report", half)
    assert (code, err) == (0, "") and standing_text(standing(half)) in out and str(half / "report.html") in out
    assert "1 loss spike" in out and "(all)" in out and (half / "report.html").read_text().count("<svg") >= 3
    code, out, err = forked.call(tmp_path, "report", half, "--json")
    assert code == 0 and [stage["name"] for stage in json.loads(out)["training"]] == ["pretrain", "sft"]


def test_a_run_without_a_row_is_drawn_empty(tmp_path: Path) -> None:
    assert standing(tmp_path) == [] and draw(tmp_path).read_text().count("<svg") == 0
