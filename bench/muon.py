"""Muon against AdamW: the share of the steps after which Muon has the loss that AdamW ends with (95 % interval over three seeds), both
at the best of five learning rates, on held-out files of Python's standard library; and what a step costs at the `small` preset."""

import statistics
import time

import torch
from _common import finish
from _text import CONFIG, Arm, command_line, interval, reached, texts, train, tune

from pascaline.data.batch import Batch
from pascaline.model.config import ModelConfig
from pascaline.model.presets import from_recipe
from pascaline.model.transformer import Model
from pascaline.tables import Stage
from pascaline.train import losses
from pascaline.train.optim import Optimizer

STEPS, EVERY = 400, 10
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
ARMS = {kind: Arm(lambda: Model(CONFIG), {"optimizer": kind}) for kind in ("adamw", "muon")}


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
    options = command_line(__doc__ or "", STEPS).parse_args()
    data, steps = texts(), options.steps
    tuning = {kind: tune(arm, RATES, data, steps, every=EVERY) for kind, arm in ARMS.items()}
    rates = {kind: next(iter(losses_)) for kind, losses_ in tuning.items()}
    curves = {kind: [train(arm, rates[kind], seed, data, steps, every=EVERY) for seed in options.seeds] for kind, arm in ARMS.items()}
    ratios = [reached(m, a[steps]) / steps for m, a in zip(curves["muon"], curves["adamw"], strict=True)]
    seconds = step_seconds()
    whole = {t: [t / 2048 * seconds["compute"] + seconds[kind] for kind in ARMS] for t in (2048, 8192, 65536)}
    finish(
        {
            "steps_ratio": interval(ratios),
            "final": {kind: [round(curve[steps], 4) for curve in curves[kind]] for kind in ARMS},
            "rates": rates,
            "tuning": {kind: {f"{rate:g}": round(loss, 4) for rate, loss in tuning[kind].items()} for kind in ARMS},
            "seconds_small": seconds,
            "step_time_ratio": {f"{t} tokens a step": muon / adamw for t, (adamw, muon) in whole.items()},
        },
        options.json,
    )


if __name__ == "__main__":
    main()
