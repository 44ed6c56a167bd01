"""The ledger: every attempt is in the sum, however it ended, and what an undisturbed run would have cost is told apart from it."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import forked  # noqa: F401 (its fork server)
import pytest

from pascaline import ledger
from pascaline.ledger import WIDTH, Attempt, Totals, cost, set_aside
from pascaline.stopping import Stopped
from pascaline.tables import Ledger

FREE = Ledger()


def line(stage: str, end: str = "done", seconds: float = 10.0, overhead: float = 1.0, stands: Any = None, devices: int = 1) -> str:
    """What an attempt leaves: `overhead` seconds of starting and saving, the rest in steps of 1 FLOP a second."""
    work = 0.0 if stands is None else seconds - overhead
    told = {"stage": stage, "end": end, "seconds": seconds, "tokens": 0, "flops": work, "devices": devices}
    facts = None if stands is None else {"seconds": float(stands), "tokens": 0, "flops": float(stands)}
    return json.dumps(told | {"overhead": overhead if stands is not None else seconds, "stands": facts}).ljust(WIDTH - 1) + "\n"


def stage(out: Path, *lines: str, rates: Ledger = FREE) -> dict[str, Any]:
    (out / "ledger.jsonl").write_text("".join(lines))
    (found,) = cost(out, rates)["stages"]
    return found


# ---- sums


def test_an_undisturbed_stage_costs_what_it_costs(tmp_path: Path) -> None:
    found = stage(tmp_path, line("pretrain", stands=9))
    assert found["final"] == found["all"] and found["final"]["seconds"] == 10 and found["ratio"] == 1 and found["ends"] == {"done": 1}
    assert stage(tmp_path, line("corpus"))["ratio"] == 1
    assert cost(tmp_path / "nowhere") == {}


def test_a_kill_costs_the_lost_steps_and_another_start(tmp_path: Path) -> None:
    """9 s of steps, of which 6 were saved; the rest takes 4 s more: an undisturbed run would have had 10 and one start."""
    found = stage(tmp_path, line("pretrain", "running", 10, stands=9), line("pretrain", "done", 5, stands=10))
    assert found["ends"] == {"killed": 1, "done": 1}
    assert (found["final"]["seconds"], found["all"]["seconds"], found["final"]["flops"], found["all"]["flops"]) == (11, 15, 10, 13)
    assert found["ratio"] == pytest.approx(15 / 11)


def test_a_rewind_costs_what_it_throws_away(tmp_path: Path) -> None:
    found = stage(tmp_path, line("sft", seconds=21, stands=15))
    assert (found["final"]["seconds"], found["all"]["seconds"], found["final"]["flops"], found["all"]["flops"]) == (16, 21, 15, 20)


def test_a_failed_start_does_not_forget_what_stands(tmp_path: Path) -> None:
    found = stage(tmp_path, line("rl", "stopped", 10, stands=9), line("rl", "failed", 3))
    assert found["final"]["flops"] == 9 and found["final"]["seconds"] == 12 and found["all"]["seconds"] == 13


def test_of_a_stage_that_starts_over_the_last_attempt_stands(tmp_path: Path) -> None:
    found = stage(tmp_path, line("corpus", "failed", 30), line("corpus", "stopped", 6), line("corpus", "done", 12))
    assert (found["final"]["seconds"], found["all"]["seconds"], found["ratio"]) == (12, 48, 4)


def test_devices_money_and_energy(tmp_path: Path) -> None:
    lines = line("pretrain", "stopped", 3600, 0, 3600, devices=8), line("pretrain", "done", 7200, 0, 3600, devices=8)
    found = stage(tmp_path, *lines, rates=Ledger(watts=500, price=2.5, currency="EUR"))
    assert found["final"]["device_hours"] == 8 and found["all"]["device_hours"] == 24 and found["ratio"] == 3
    assert (found["final"]["kwh"], found["all"]["kwh"]) == (4, 12) and (found["final"]["money"], found["all"]["money"]) == (20, 60)
    total = cost(tmp_path, FREE)["total"]
    assert total["all"]["device_hours"] == 24 and total["all"]["kwh"] is None and total["all"]["money"] is None


def test_runs_set_aside_are_in_the_sum(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for number, lines in enumerate([[line("corpus", "running", 5)], [line("corpus"), line("sft", "failed", 20, stands=19)]], 1):
        out.mkdir(exist_ok=True)
        with open(out / "ledger.jsonl", "a") as file:
            file.writelines(lines)
        (old := tmp_path / f"run.old-{number}").mkdir()
        set_aside(out, old)
    with open(out / "ledger.jsonl", "a") as file:
        file.write(line("corpus", "done", 10))
    found = cost(out, FREE)
    assert found["aside"]["all"]["seconds"] == 35 and found["aside"]["ends"] == {"killed": 1, "done": 1, "failed": 1}
    assert [stage["name"] for stage in found["stages"]] == ["corpus"] and found["total"]["final"]["seconds"] == 10
    assert found["total"]["all"]["seconds"] == 45 and found["total"]["ratio"] == pytest.approx(4.5)
    assert cost(tmp_path / "run.old-2", FREE)["total"]["all"]["seconds"] == 35
    set_aside(tmp_path / "nothing", old)  # an old run without a ledger


# ---- attempts


@pytest.mark.parametrize(
    ("error", "end"), [(None, "done"), (Stopped("x"), "stopped"), (KeyboardInterrupt(), "stopped"), (ValueError("x"), "failed")]
)
def test_how_an_attempt_ends(error: BaseException | None, end: str, tmp_path: Path) -> None:
    try:
        with Attempt(tmp_path, "sft", devices=2) as attempt:
            attempt.follow(lambda: (Totals(0.0, 5, 50.0), Totals(2.0, 7, 70.0)))
            if error:
                raise error
    except BaseException as caught:
        assert caught is error
    text = (tmp_path / "ledger.jsonl").read_text()
    assert len(text) == WIDTH and text.endswith(" \n")
    told = json.loads(text)
    assert (told["end"], told["devices"], told["flops"], told["tokens"]) == (end, 2, 50.0, 5)
    assert told["stands"] == {"seconds": 2.0, "tokens": 7, "flops": 70.0} and 0 <= told["overhead"] <= told["seconds"]


def _work_until_killed(out: str) -> None:
    spent = Totals()
    with Attempt(Path(out), "pretrain") as attempt:
        attempt.follow(lambda: (spent, spent))
        while True:
            time.sleep(0.01)
            spent.add(0.01, 10, 100.0)


def test_kill_9_hides_little(tmp_path: Path) -> None:
    """Killed some moments after its last word, an attempt has told most of what it did; the next one's line comes after it, whole."""
    process = multiprocessing.get_context("forkserver").Process(target=_work_until_killed, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 60
    while not (seen := cost(tmp_path, FREE)) or seen["total"]["all"]["flops"] < 2000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seen["stages"][0]["ends"] == {"running": 1}
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with Attempt(tmp_path, "pretrain"):
        pass
    found = cost(tmp_path, FREE)["stages"][0]
    assert found["ends"] == {"killed": 1, "done": 1} and found["all"]["flops"] >= 2000
    assert found["all"]["seconds"] > 0.2 and (tmp_path / "ledger.jsonl").stat().st_size == 2 * WIDTH


def test_a_run_that_is_silent_for_long_was_killed(tmp_path: Path) -> None:
    assert stage(tmp_path, line("sft", "running", stands=9))["ends"] == {"running": 1}
    long_ago = time.time() - 2 * ledger.DEAD
    os.utime(tmp_path / "ledger.jsonl", (long_ago, long_ago))
    assert cost(tmp_path, FREE)["stages"][0]["ends"] == {"killed": 1}


def test_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(line("corpus") + line("tokenizer")[:50])
    with Attempt(tmp_path, "tokenizer"):
        pass
    assert [(s["name"], s["ends"]) for s in cost(tmp_path, FREE)["stages"]] == [("corpus", {"done": 1}), ("tokenizer", {"done": 1})]
    assert (tmp_path / "ledger.jsonl").stat().st_size == 3 * WIDTH


def test_a_full_disk_stops_an_attempt_at_its_start_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ledger.jsonl").write_text(line("corpus"))

    def full(fd: int, data: bytes, place: int) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as small:
        small.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"), Attempt(tmp_path, "sft"):
            raise AssertionError
    assert (tmp_path / "ledger.jsonl").read_text() == line("corpus")
    with Attempt(tmp_path, "sft"), monkeypatch.context() as small:
        small.setattr(os, "pwrite", full)
        time.sleep(0.3)  # some beats
    assert cost(tmp_path, FREE)["stages"][1]["ends"] == {"done": 1}
