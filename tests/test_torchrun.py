"""A rank that dies under torchrun: the run ends with its reason, or starts again where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pascaline.runs import Metrics, read_json

COIN = Path(__file__).parent / "coin.toml"
STAGE = "03-pretrain"
FAILS = """
import os, sys
from pascaline.cli import main
from pascaline.train import losses

compute, calls = losses.compute, 0

def failing(*arguments):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 7:
        raise {error}
    return compute(*arguments)

losses.compute = failing
main()
"""


def start(out: Path, *program: str, restarts: int = 0, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Two ranks that pre-train 30 steps."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    asked = ["run", str(COIN), "--out", str(out), "--stage", "pretrain", "--set", "pretrain.tokens=30_000", *options]
    environment = os.environ | {"PYTHONPATH": f"{COIN.parent}:{COIN.parent.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*torchrun, *(program or ("-m", "pascaline")), *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def end(process: subprocess.Popen[str]) -> str:
    """Its standard error; the exit code must be 0."""
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    return told


def ranks(process: subprocess.Popen[str]) -> dict[int, int]:
    """Rank -> process id of torchrun's children."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = dict(word.partition("=")[::2] for word in Path(f"/proc/{child}/environ").read_text().split("\0"))
        found[int(variables["RANK"])] = int(child)
    return found


def steps(out: Path) -> int:
    return len(Metrics.read(out / STAGE / "metrics.jsonl"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    end(start(out))
    return out


@pytest.mark.parametrize("killed, options", [(0, ()), (1, ("--fresh",))])
def test_a_killed_rank_starts_both_again_and_the_model_is_the_same(
    killed: int, options: tuple[str, ...], straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(out, restarts=1, options=options)
    while steps(out) < 8 and process.poll() is None:
        time.sleep(0.005)
    os.kill(ranks(process)[killed], signal.SIGKILL)
    told = end(process)
    assert f"pascaline (rank {1 - killed}): another rank is gone" in told and "Traceback" not in told
    weights = [(folder / STAGE / "model" / "model.safetensors").read_bytes() for folder in (out, straight)]
    assert weights[0] == weights[1] and steps(out) == steps(straight)
    assert not out.with_name("run.old-1").exists()  # --fresh was carried out once
    cost, once = ((read_json(folder / STAGE / "lineage.json") or {})["cost"] for folder in (out, straight))
    assert cost["ends"]["done"] == 1 and sum(cost["ends"].values()) == 2
    assert cost["final"]["flops"] == once["final"]["flops"] <= cost["all"]["flops"]  # equal if it was killed just after a checkpoint


@pytest.mark.parametrize(
    "error, words",
    [
        ("__import__('torch').OutOfMemoryError('CUDA out of memory')", "(rank 1): out of memory; a smaller micro_tokens"),
        ("OSError(28, 'No space left on device', 'shard-0.bin')", "(rank 1): no space left on the device while writing shard-0.bin"),
        ("ValueError('nobody thought of this')", "(rank 1): ValueError: nobody thought of this"),
    ],
)
def test_a_rank_that_fails_says_which_it_is_and_why(error: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS.format(error=error))
    process = start(tmp_path / "run", str(tmp_path / "fails.py"))
    _, told = process.communicate(timeout=100)
    assert process.returncode != 0
    assert f"pascaline {words}" in told.partition("ChildFailedError")[0] and told.count(words) == 1
    assert ("Traceback" in told.partition("torch/distributed/elastic")[0]) == ("ValueError" in error)
