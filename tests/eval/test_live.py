"""How far a run is, told from a folder that is still being written."""

import json
import shutil
from pathlib import Path

import forked
import pytest

from pascaline.eval.forms import aligned
from pascaline.eval.live import draw, standing, standing_table
from pascaline.recipe import Recipe
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
    assert (code, err) == (0, "") and aligned(standing_table(standing(half))) in out and str(half / "report.html") in out
    assert "1 loss spike" in out and "(all)" in out and (half / "report.html").read_text().count("<svg") >= 3
    code, out, err = forked.call(tmp_path, "report", half, "--json")
    assert code == 0 and [stage["name"] for stage in json.loads(out)["training"]] == ["pretrain", "sft"]


def test_the_cost_is_shown_and_the_price_may_be_given_later(half: Path, tmp_path: Path) -> None:
    code, out, _ = forked.call(tmp_path, "report", half)
    assert code == 0 and "all/final" in out and "kWh" not in out and "money" not in out
    page = (half / "report.html").read_text()
    assert "<h2>Cost</h2>" in page and "<h2>So far</h2>" in page and "all/final" in page
    code, out, _ = forked.call(tmp_path, "report", half, "--price", 3, "--watts", 200)
    assert code == 0 and "kWh" in out and "money" in out and "200 W a device" in out and "kWh" in (half / "report.html").read_text()
    code, out, _ = forked.call(tmp_path, "report", half, "--price", 3, "--watts", 200, "--json")
    told = json.loads(out)["ledger"]
    assert [stage["name"] for stage in told["stages"]] == list(Recipe().stages)
    total = told["total"]["all"]
    assert set(total) == {"seconds", "device_hours", "flops", "kwh", "money"} and total["device_hours"] > 0
    assert total["money"] == pytest.approx(3 * total["device_hours"]) and total["kwh"] == pytest.approx(0.2 * total["device_hours"])
    assert total["flops"] == pytest.approx(sum(stage["all"]["flops"] for stage in told["stages"]))


def test_a_run_without_a_row_is_drawn_empty(tmp_path: Path) -> None:
    assert standing(tmp_path) == [] and draw(tmp_path, {}).read_text().count("<svg") == 0
