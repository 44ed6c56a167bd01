"""What several processes on one machine cost: tokens per second of training steps of one global batch by one process with one thread and
with two, and by two ranks of one thread each (gloo) that share out the data only, or the experts too, or are replicas. The variants take
turns, each time in new processes; a turn's number is the median over its steps."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _common import CONFIG, finish

from pascaline.data.batch import Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.model.transformer import Model
from pascaline.runs import Metrics
from pascaline.tables import Stage
from pascaline.train import parallel
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss

ROWS, LENGTH, MICRO = 16, 256, 8
WARM = 3  # steps of a turn that do not count
VARIANTS = {  # ranks, of which so many share out the experts, replicas, threads of each rank
    "one process, 1 thread": (1, 1, 1, 1),
    "one process, 2 threads": (1, 1, 1, 2),
    "2 ranks, data": (2, 1, 1, 1),
    "2 ranks, experts": (2, 2, 1, 1),
    "2 ranks, replicas": (2, 1, 2, 1),
}


def work(folder: Path, experts: int, replicas: int, steps: int) -> None:
    """Train in this process, or with the other ranks; tokens_per_s of each step goes to folder/metrics.jsonl."""
    ranks = parallel.start(torch.device("cpu"), experts, replicas)
    draw = np.random.default_rng(0)
    texts = [Sample(draw.integers(0, CONFIG.vocab_size, LENGTH), {"ce": np.ones(LENGTH, np.float32)}) for _ in range(4 * ROWS)]
    source = Loader(ListSamples(texts), LENGTH, ROWS, MICRO, 0, seed=0, rank=ranks.rank, ranks=ranks.size)
    stage = Stage(save_every=steps, lr=1e-3)
    trainer = Trainer(Model(CONFIG).init_(0), stage, Loss(), folder, "bench", torch.float32, ranks)
    trainer.run(source, steps, quiet=True)


def turn(size: int, experts: int, replicas: int, threads: int, steps: int) -> float:
    """Tokens per second of a variant, in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
        mesh = ["--experts", str(experts), "--replicas", str(replicas)]
        command = [sys.executable, *torchrun, __file__, "--work", folder, *mesh, "--steps", str(steps)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        rates = [row["tokens_per_s"] for row in Metrics.read(Path(folder) / "metrics.jsonl")]
    return statistics.median(rates[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    for mesh in ("--experts", "--replicas"):
        parser.add_argument(mesh, type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Path(options.work), options.experts, options.replicas, options.steps)
        return
    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, variant in VARIANTS.items():
            rates[name].append(turn(*variant, options.steps))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    one, two = (medians[f"one process, {threads}"] for threads in ("1 thread", "2 threads"))
    finish(
        {
            "tokens_per_s": {name: round(rate) for name, rate in medians.items()},
            "to_one_thread": {name: round(rate / one, 3) for name, rate in medians.items()},
            "to_two_threads": {name: round(rate / two, 3) for name, rate in medians.items()},
            "rounds": {name: [round(rate) for rate in values] for name, values in rates.items()},
            "tokens_a_step": ROWS * LENGTH,
            "steps": options.steps,
        },
        options.json,
    )


if __name__ == "__main__":
    main()
