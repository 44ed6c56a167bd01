"""Sinks: the right steps reach each tool, over kills and rewinds; a tool that fails, hangs or prints changes nothing."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from trainee import Watched, loader, rows, trainer, weights

from pascaline.runs import write_json
from pascaline.train import sinks
from pascaline.train.sinks import Sinks, scalars

STEPS = 12

# The parts of wandb 0.31 and trackio 0.43 that are called, with their signatures; what they were told is in the file $TOLD.
STAND_INS = {
    "wandb": """
import json, os
def tell(*what): print(json.dumps(what), file=open(os.environ["TOLD"], "a"))
class Settings:
    def __init__(self, console): assert console == "off"
class Run:
    def define_metric(self, name, *, step_metric): tell("define", name, step_metric)
    def log(self, data, step=None, commit=None): assert step is None; tell("log", data)
    def finish(self, exit_code=None): tell("finish", exit_code)
def init(*, project, group, job_type, name, id, resume, dir, config, settings):
    assert resume == "allow" and os.path.isdir(dir)
    tell("init", project, group, job_type, name, id, config)
    return Run()
""",
    "trackio": """
import json, os
print("* noise on standard output")
def tell(*what): print(json.dumps(what), file=open(os.environ["TOLD"], "a"))
class Run:
    def log(self, metrics, step=None): tell("log", {"step": step, **metrics})
    def finish(self): tell("finish", None)
def init(project, name=None, group=None, *, config=None, resume="never", embed=True):
    assert resume == "allow" and not embed
    tell("init", project, group, name, config)
    return Run()
""",
}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setattr(sinks, "PATIENCE", 60.0)  # the tests read what the other side wrote
    return tmp_path / "told"


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Modules of these names that come first, here and in the sinks' processes."""
    place = folder / "modules"
    place.mkdir(exist_ok=True)
    for name, text in modules.items():
        (place / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(place)


def train(out: Path, names: list[str], source: Any = None, quiet: bool = True) -> None:
    one = trainer(out / "01-toy")
    one.sinks = Sinks(names, out, "toy")
    one.run(source or loader(), STEPS, quiet=quiet)


class Crash(Exception):
    pass


def crash_at(step: int) -> Watched:
    def act(now: int, _: Any) -> None:
        if now == step:
            raise Crash

    return Watched(act)


def crashed_and_resumed(out: Path, names: list[str]) -> None:
    """Killed in step 8, with the checkpoint of step 6: steps 6 and 7 come twice."""
    write_json(out / "recipe.json", {"seed": 7})
    with pytest.raises(Crash):
        train(out, names, crash_at(8))
    train(out, names)


def test_only_finite_scalars_go() -> None:
    row = {"step": 3, "loss": 1.5, "tokens": 7, "skipped": True, "guard": "spike", "expert_load": [[1.0]], "nan": math.nan, "none": None}
    assert scalars(row) == {"loss": 1.5, "tokens": 7.0, "skipped": 1.0}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run_there(name: str, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, **STAND_INS)
    out = tmp_path / "demo"
    crashed_and_resumed(out, [name])
    said = [json.loads(line) for line in told.read_text().splitlines()]
    logged = [what for kind, what, *_ in said if kind == "log"]
    assert [row["step"] for row in logged] == [*range(8), *range(6, 12)]  # the axis is the step, so a repeated one is drawn over itself
    for row in logged[8:]:
        want = rows(out / "01-toy")[row["step"]]
        assert row["loss"] == pytest.approx(want["loss"]) and "expert_load" not in row and row["tokens_per_s"] > 0
    starts = [what for kind, *what in said if kind == "init"]
    identity = (out / "sinks" / "id").read_text()
    assert len(starts) == 2 and starts[0] == starts[1] and len(identity) == 8
    assert starts[0][:2] == ["pascaline", f"demo-{identity}"] and f"{identity}-toy" in starts[0][-2] and starts[0][-1] == {"seed": 7}
    ends = [what[1] for what in said if what[0] == "finish"]
    assert ends == ([1, 0] if name == "wandb" else [None, None])  # the first was not the end
    assert name == "trackio" or ["define", "*", "step"] in said


def test_what_a_tool_prints_is_in_its_log(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    stand_in(tmp_path, monkeypatch, **STAND_INS)
    train(tmp_path, ["trackio"])
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "sinks" / "trackio-toy.log").read_text() == "* noise on standard output\n"


def test_tensorboard_has_each_step_once(told: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    crashed_and_resumed(tmp_path, ["tensorboard"])
    read = accumulator.EventAccumulator(str(tmp_path / "sinks" / "tensorboard" / "toy"))
    read.Reload()
    found = rows(tmp_path / "01-toy")
    assert {"loss", "ce", "mtp", "lr", "grad_norm", "tokens_per_s", "max_violation"} <= set(read.Tags()["scalars"])
    assert "expert_load" not in read.Tags()["scalars"] and "step" not in read.Tags()["scalars"]
    for name in ("loss", "grad_norm"):
        assert [event.step for event in read.Scalars(name)] == list(range(STEPS))
        assert [event.value for event in read.Scalars(name)] == pytest.approx([row[name] for row in found])


def test_tensorboard_follows_a_rewind(told: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Sinks(["tensorboard"], tmp_path, "toy").open(print) as one:
        for step, loss in [(0, 5.0), (1, 4.0), (2, 9.0), (3, 9.5), (1, 3.0), (2, 2.0)]:
            one.log({"step": step, "loss": loss})
    read = accumulator.EventAccumulator(str(tmp_path / "sinks" / "tensorboard" / "toy"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(0, 5.0), (1, 3.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise RuntimeError('no network')", "RuntimeError: no network"),
        (STAND_INS["trackio"].replace('tell("log"', 'raise OSError(28, "No space left on device"'), "No space left on device"),
        ("import os; os._exit(3)", "with an error|Broken pipe"),
    ],
)
def test_a_sink_that_fails_is_said_once_and_the_run_goes_on(
    text: str, why: str, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "straight", [])
    capsys.readouterr()
    stand_in(tmp_path, monkeypatch, **{**STAND_INS, "trackio": text})
    train(tmp_path / "run", ["trackio", "wandb"], quiet=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert len(said) == 1 and said[0].startswith("toy: trackio failed, going on without it (") and any(w in said[0] for w in why.split("|"))
    assert weights(tmp_path / "run" / "01-toy") == weights(tmp_path / "straight" / "01-toy")
    assert rows(tmp_path / "run" / "01-toy") == rows(tmp_path / "straight" / "01-toy")
    assert told.read_text().count('["log"') == STEPS  # the other sink has everything


def test_a_sink_that_hangs_is_left_behind(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It neither reads nor ends: the run does not wait for it. Too far behind, it is given up."""
    monkeypatch.setattr(sinks, "PATIENCE", 0.1)
    stand_in(tmp_path, monkeypatch, trackio="import os, time\nprint(os.getpid(), file=open(os.environ['TOLD'], 'a'))\ntime.sleep(600)")
    train(tmp_path, ["trackio"])
    assert len(rows(tmp_path / "01-toy")) == STEPS
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int(told.read_text()), signal.SIGKILL)  # it was left alive
    said: list[str] = []
    monkeypatch.setattr(sinks, "ROOM", 1000)
    with Sinks(["trackio"], tmp_path, "other").open(said.append) as one:
        process = one._pipes[0]._process
        for step in range(5000):
            one.log({"step": step, "loss": 1.0})
    assert len(said) == 1 and "does not keep up" in said[0] and process.wait(60) == -signal.SIGKILL


def test_a_sink_does_not_hear_ctrl_c(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to the whole group: the sink must still take the rows up to the save."""
    stand_in(tmp_path, monkeypatch, **STAND_INS)
    with Sinks(["trackio"], tmp_path, "toy").open(print) as one:
        assert os.getpgid(one._pipes[0]._process.pid) != os.getpgid(0)


def test_the_loop_imports_no_tool() -> None:
    import subprocess
    import sys

    code = "import sys, pascaline.train.sinks; assert not {'torch', 'tensorboard', 'wandb', 'trackio', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
