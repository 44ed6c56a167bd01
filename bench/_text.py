"""What the benchmarks of training dynamics share: a small byte-level model, rows of Python's standard library, held-out loss, runs at
tuned learning rates, intervals."""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pascaline.data.batch import Batch, Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.data.sources import documents
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.tables import Guard, Stage
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss, token_logprobs

ROW, PAD = 128, 256
ROWS = 16  # a step
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by the number of seeds
CONFIG = ModelConfig(
    vocab_size=257, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, moe_intermediate_size=32,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, initializer_range=0.05,
)  # fmt: skip


Texts = tuple[list[Sample], list[Sample]]


def texts(count: int = 2_000_000) -> Texts:
    """Training and held-out rows of bytes; every tenth file is held out."""
    parts: Texts = ([], [])
    for i, document in enumerate(documents(["stdlib"], count, lambda _: None)):
        data = np.frombuffer(document.text.encode(), np.uint8).astype(np.int64)
        rows = [data[at : at + ROW] for at in range(0, len(data), ROW)]
        parts[i % 10 == 9].extend(Sample(row, {"ce": np.ones(len(row), np.float32)}) for row in rows if len(row) > 1)
    return parts


@torch.no_grad()
def held_out_loss(model: Model, samples: list[Sample], rows: int = 512) -> float:
    """Mean nats a byte over the first rows."""
    total = count = 0.0
    loader = Loader(ListSamples(samples), ROW, 64, 64, PAD, 0)
    for step in range(rows // 64):
        (batch,) = loader.step(step)
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        logprob, *_ = token_logprobs(hidden[:, :-1].flatten(0, 1), model.head_weight, batch.tokens[:, 1:].flatten())
        weight = batch.streams["ce"][:, 1:].flatten()
        total, count = total - float((weight * logprob).sum()), count + float(weight.sum())
    return total / count


@dataclass
class Arm:
    """One side of a comparison: how its model is made, and what of the stage is its own."""

    model: Callable[[], Model]
    stage: dict[str, Any] = field(default_factory=dict)


class Measured:
    """The loader, and the held-out loss every few steps."""

    def __init__(self, loader: Loader, model: Model, held_out: list[Sample], every: int):
        self.loader, self.model, self.held_out, self.every, self.facts = loader, model, held_out, every, loader.facts
        self.curve: dict[int, float] = {}

    def step(self, step: int) -> list[Batch]:
        if self.every and step and step % self.every == 0:
            self.curve[step] = held_out_loss(self.model, self.held_out, 128)
        return self.loader.step(step)

    def documents(self, step: int) -> list[Any]:
        return []


def train(arm: Arm, rate: float, seed: int, data: Texts, steps: int, every: int = 0, schedule: str = "constant") -> dict[int, float]:
    """Steps -> held-out loss every so many steps and at the end. A constant rate after the warm-up favours no step count; a run that
    is only judged at its end (every 0) is judged on four times as many rows."""
    model = arm.model().init_(seed)
    off = Guard(sigma=0.0, patience=0)
    stage = Stage(sequence_length=ROW, lr=rate, warmup=20, schedule=schedule, mtp=0.0, save_every=10**6, guard=off, **arm.stage)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, stage, Loss(), Path(folder), "bench", torch.float32)
        source = Measured(Loader(ListSamples(data[0]), ROW, ROWS, ROWS, PAD, seed), model, data[1], every)
        trainer.run(source, steps, quiet=True)
    return {**source.curve, steps: held_out_loss(model, data[1], 128 if every else 512)}


def command_line(description: str, steps: int) -> argparse.ArgumentParser:
    """The command line that these benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    return parser


def tune(arm: Arm, rates: Iterable[float], data: Texts, steps: int, **how: Any) -> dict[float, float]:
    """Learning rate -> the loss that seed 0 ends with, best first."""
    found = {rate: train(arm, rate, 0, data, steps, **how)[steps] for rate in rates}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def reached(curve: dict[int, float], loss: float) -> float:
    """The step at which a curve first comes down to `loss`, between two measurements in a straight line; infinite if never."""
    points = sorted(curve.items())
    for (before, high), (after, low) in pairwise(points):
        if low <= loss:
            return before + (after - before) * min(max((high - loss) / max(high - low, 1e-9), 0.0), 1.0)
    return float("inf")


def interval(values: list[float]) -> dict[str, Any]:
    """Mean over the seeds and half of its 95 % interval; neither where a seed is infinite (`reached` never)."""
    if not all(map(math.isfinite, values)):
        return {"mean": None, "plus_minus": None, "seeds": [value if math.isfinite(value) else None for value in values]}
    spread = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T_95 else float("nan")
    return {"mean": statistics.mean(values), "plus_minus": spread, "seeds": values}
