"""Peak memory of training steps against what `pascaline doctor --recipe` computes, on the CPU, each case in processes of its own.

Measured: every allocation of PyTorch's from the building of the model to the end of three steps, as its profiler tells (the peak of their
sum); and in another run, without the profiler, how much the resident set grew: there are also what kernels and gloo take by themselves, and
what the C library keeps of freed memory.
"""

import argparse
import json
import multiprocessing
import os
import resource
import socket
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _common import DTYPES, finish
from torch.profiler import ProfilerActivity, profile

from pascaline.data.batch import Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.model.presets import from_recipe
from pascaline.model.transformer import Model
from pascaline.progress import Progress
from pascaline.stopping import Interrupt
from pascaline.tables import Pretrain
from pascaline.train import memory, parallel
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss

STEPS = 3
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("mini", 1, {}),
    ("mini", 1, {"activation_checkpointing": True}),
    ("mini", 1, {"optimizer": "muon"}),
    ("mini", 1, {"dtype": "bfloat16"}),
    ("mini", 1, {"dtype": "bfloat16", "optimizer": "muon", "micro_tokens": 1024}),
    ("mini", 2, {}),
    ("mini", 2, {"activation_checkpointing": True, "optimizer": "muon"}),
    ("mini", 2, {"dtype": "bfloat16"}),
    ("mini", 2, {"experts": 2}),
    ("mini", 2, {"replicas": 2}),
    ("mini", 1, {"sequence_length": 1024}),
    ("small", 1, {"micro_tokens": 1024, "activation_checkpointing": True}),
    ("small", 1, {"micro_tokens": 1024, "dtype": "bfloat16", "optimizer": "muon"}),
    ("small", 2, {"micro_tokens": 1024}),
]


def plan(
    preset: str, ranks: int, dtype: str = "float32", experts: int = 1, replicas: int = 1, model: Any = None, **stage: Any
) -> memory.Plan:
    table = Pretrain(**{"sequence_length": 256, "micro_tokens": 2048, "tokens_per_step": 4096 * ranks, **stage})
    config = from_recipe({"preset": preset, **(model or {})})
    return memory.Plan(config, table, ranks, experts, DTYPES[dtype].itemsize, replicas=replicas)


def steps(case: memory.Plan, ranks: parallel.Ranks, folder: Path) -> None:
    """Build a model and train it for a few steps."""
    dtype = {4: torch.float32, 2: torch.bfloat16}[case.size]
    trainer = Trainer(Model(case.config).init_(0), case.stage, Loss(mtp=case.stage.mtp * case.mtp), folder, "bench", dtype, ranks)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, case.config.vocab_size, (case.row,), generator=generator).numpy() for _ in range(64)]
    samples = ListSamples([Sample(text, {"ce": torch.ones(case.row).numpy()}) for text in texts])
    rows = case.stage.tokens_per_step // case.row
    source = Loader(samples, case.row, rows, case.rows, 0, 0, rank=ranks.rank, ranks=ranks.size)
    with Interrupt() as interrupt, Progress("bench", enabled=False) as progress:
        for step in range(STEPS):
            trainer._launch(source, step, STEPS, interrupt)
            trainer._settle(source, 0, progress)


def child(rank: int, case: memory.Plan, port: int, watched: bool, send: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = parallel.start(torch.device("cpu"), case.experts, case.replicas)
    case.weights  # noqa: B018 (torch's own first-time memory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) if watched else nullcontext() as seen,
    ):
        steps(case, ranks, Path(folder))
    send.send((rank, highest(seen) if seen else 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def highest(seen: profile) -> int:
    """The largest sum of the allocations at a time."""
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def measure(case: memory.Plan, watched: bool) -> int:
    """Bytes of the first rank: allocated by PyTorch if `watched`, else resident beyond what the imports took."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    receive, send = context.Pipe(duplex=False)
    processes = [context.Process(target=child, args=(rank, case, port, watched, send)) for rank in range(case.ranks)]
    for process in processes:
        process.start()
    send.close()  # else a child that dies is waited for
    told = dict(receive.recv() for _ in processes)
    for process in processes:
        process.join()
    return told[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--case", type=int, nargs="*", help="only these, counted from 0")
    options = parser.parse_args()
    found = []
    for number in range(len(CASES)) if options.case is None else options.case:
        preset, ranks, settings = CASES[number]
        case = plan(preset, ranks, **settings)
        computed, allocated, resident = memory.peak(case), measure(case, True), measure(case, False)
        row = {"model": preset, "ranks": ranks, **settings, "computed_mb": round(computed["peak"] / 1e6, 1)}
        row |= {"allocated_mb": round(allocated / 1e6, 1), "resident_mb": round(resident / 1e6, 1)}
        found.append(row | {"ratio": round(computed["peak"] / allocated, 3)})
        if not options.json:
            print(json.dumps(found[-1]), flush=True)
    ratios = sorted(row["ratio"] for row in found)
    finish({"ratios": [ratios[0], ratios[-1]], "cases": found if options.json else len(found)}, options.json)


if __name__ == "__main__":
    main()
