"""Muon against AdamW: the share of the steps after which Muon has the loss that AdamW ends with (95 % interval over three seeds), both
at the best of five learning rates, on held-out files of Python's standard library; and what a step costs at the `small` preset."""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _common import finish
from _text import CONFIG, PAD, ROW, held_out_loss, texts

from pascaline.data.batch import Batch, Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.model.config import ModelConfig, from_recipe
from pascaline.model.transformer import Model
from pascaline.recipe import Guard, Stage
from pascaline.train import losses
from pascaline.train.loop import Trainer
from pascaline.train.optim import Optimizer

ROWS, STEPS, EVERY = 16, 400, 10
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
OFF = Guard(sigma=0.0, patience=0)


class Measured:
    """The loader, and the held-out loss every few steps."""

    def __init__(self, loader: Loader, model: Model, held_out: list[Sample]):
        self.loader, self.model, self.held_out, self.facts = loader, model, held_out, loader.facts
        self.curve: dict[int, float] = {}

    def step(self, step: int) -> list[Batch]:
        if step and step % EVERY == 0:
            self.curve[step] = held_out_loss(self.model, self.held_out, 128)
        return self.loader.step(step)

    def documents(self, step: int) -> list[Any]:
        return []


def train(kind: str, rate: float, seed: int, train_rows: list[Sample], held_out: list[Sample]) -> dict[int, float]:
    """Steps -> held-out loss, at a constant rate after the warm-up, so that no step count is favoured by a schedule."""
    model = Model(CONFIG).init_(seed)
    stage = Stage(sequence_length=ROW, optimizer=kind, lr=rate, warmup=20, schedule="constant", mtp=0.0, save_every=10**6, guard=OFF)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, stage, losses.Loss(), Path(folder), kind, torch.float32)
        source = Measured(Loader(ListSamples(train_rows), ROW, ROWS, ROWS, PAD, seed), model, held_out)
        trainer.run(source, STEPS, quiet=True)
    return {**source.curve, STEPS: held_out_loss(model, held_out, 128)}


def reached(curve: dict[int, float], loss: float) -> float:
    """The step at which a curve first comes down to `loss`, between two measurements in a straight line; infinite if never."""
    points = sorted(curve.items())
    for (before, high), (after, low) in pairwise(points):
        if low <= loss:
            return before + (after - before) * min(max((high - loss) / max(high - low, 1e-9), 0.0), 1.0)
    return float("inf")


def step_seconds(tokens: int = 2048) -> dict[str, float]:
    """Seconds at the `small` preset: forward and backward of `tokens`, and each optimizer's update; medians of alternating rounds."""
    config: ModelConfig = from_recipe({"preset": "small", "vocab_size": 4096})
    ids = torch.randint(0, config.vocab_size, (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.arange(256).expand_as(ids), torch.zeros_like(ids), {"ce": torch.ones(ids.shape)})
    found: dict[str, list[float]] = {"compute": [], "adamw": [], "muon": []}
    models = {kind: Model(config).init_(0) for kind in ("adamw", "muon")}
    optimizers = {kind: Optimizer(model, Stage(optimizer=kind), torch.bfloat16) for kind, model in models.items()}
    for _ in range(4):
        for kind, optimizer in optimizers.items():
            began = time.perf_counter()
            losses.compute(models[kind], batch, losses.totals([batch]), losses.Loss())[0].backward()
            optimizer.collect()
            middle = time.perf_counter()
            optimizer.step(1e-4, optimizer.norm())
            found["compute"].append(middle - began)
            found[kind].append(time.perf_counter() - middle)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    options = parser.parse_args()
    train_rows, held_out = texts()
    kinds = ("adamw", "muon")
    tuning = {kind: {rate: train(kind, rate, 0, train_rows, held_out)[STEPS] for rate in RATES} for kind in kinds}
    rates = {kind: min(tuning[kind], key=lambda rate: tuning[kind][rate]) for kind in kinds}
    curves = {kind: [train(kind, rates[kind], seed, train_rows, held_out) for seed in options.seeds] for kind in kinds}
    ratios = [reached(m, a[STEPS]) / STEPS for m, a in zip(curves["muon"], curves["adamw"], strict=True)]
    spread = 4.303 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) == 3 else float("nan")  # t of two degrees of freedom
    seconds = step_seconds()
    whole = {t: [t / 2048 * seconds["compute"] + seconds[kind] for kind in kinds] for t in (2048, 65536)}
    finish(
        {
            "steps_ratio": {"mean": statistics.mean(ratios), "plus_minus": spread, "seeds": ratios},
            "final": {kind: [round(curve[STEPS], 4) for curve in curves[kind]] for kind in kinds},
            "rates": rates,
            "tuning": {kind: {f"{rate:g}": round(loss, 4) for rate, loss in tuning[kind].items()} for kind in kinds},
            "seconds_small": seconds,
            "step_time_ratio": {f"{t} tokens a step": muon / adamw for t, (adamw, muon) in whole.items()},
        },
        options.json,
    )


if __name__ == "__main__":
    main()
