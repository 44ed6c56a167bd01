"""A run that is hit by a poisoned document, by a NaN in a gradient, or by a learning rate that diverges: held-out loss with the guard
and without it, against the run that nothing hit. A byte-level model on Python's standard library."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import finish
from _text import CONFIG, PAD, ROW, held_out_loss, texts

from pascaline.data.batch import Batch, Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.errors import BadInput
from pascaline.model.transformer import Model
from pascaline.tables import Guard as Rule
from pascaline.tables import Stage
from pascaline.train.guard import Guard
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss

ROWS, STEPS = 8, 300
LR, TOO_FAST = 4e-3, 64  # the peak rate, and how many times it from the middle of the run that diverges on
RULE = Rule(patience=10, margin=0.1, rewinds=8)


class Unguarded(Guard):
    def limits(self, rule: Rule) -> tuple[float, float]:
        return float("inf"), float("inf")

    def judge(self, rule: Rule, loss: float | None, norm: float, limits: tuple[float, float] | None = None) -> str:
        return ""

    def drifted(self, rule: Rule) -> bool:
        return False


class Injected:
    """The clean data, and at some of its steps what is not clean. Keyed by the data's own number, as a bad document would be."""

    def __init__(self, loader: Loader, trainer: Trainer, kind: str):
        self.loader, self.model, self.kind, self.facts = loader, trainer.model, kind, loader.facts
        self.trainer, self.faster, update = trainer, 1.0, trainer.optimizer.step
        free = isinstance(trainer.guard, Unguarded)  # also of what is not finite
        trainer.optimizer.step = lambda lr, norm, fine: update(lr * self.faster, norm, None if free else fine)  # type: ignore[method-assign]

    def step(self, step: int) -> list[Batch]:
        batches = self.loader.step(step)
        if self.kind == "rate":  # keyed by the update's number: going back does not help, only halving does
            self.faster = TOO_FAST if step - self.trainer.guard.shift >= STEPS // 2 else 1.0
        if self.kind == "poison" and 250 <= step < 256:  # a document of noise, six steps long
            for batch in batches:
                batch.tokens = torch.randint(0, 256, batch.tokens.shape, generator=torch.Generator().manual_seed(step))
        if self.kind == "nan" and step == 200:
            hook = self.model.model.norm.weight.register_hook(lambda gradient: (hook.remove(), gradient * float("nan"))[1])
        return batches

    def documents(self, step: int) -> list[Any]:
        return self.loader.documents(step)


def train(seed: int, kind: str, guarded: bool, train_rows: list[Sample], held_out: list[Sample]) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Model(CONFIG).init_(seed)
    stage = Stage(sequence_length=ROW, lr=LR, warmup=120, decay=0.3, final=0.02, save_every=20, keep_last=8, guard=RULE, mtp=0.0)
    loader = Loader(ListSamples(train_rows), ROW, ROWS, ROWS, PAD, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, stage, Loss(), Path(folder), f"{kind} {'guarded' if guarded else 'unguarded'}", torch.float32)
        trainer.guard = Guard() if guarded else Unguarded()
        try:
            trainer.run(Injected(loader, trainer, kind), STEPS, quiet=True)
        except BadInput as e:
            return {"loss": float("nan"), "counts": trainer.guard.counts, "ended": str(e)}
    return {"loss": held_out_loss(model, held_out), "counts": trainer.guard.counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kinds", nargs="+", default=["poison", "nan", "rate"])
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    options = parser.parse_args()
    train_rows, held_out = texts()
    result: dict[str, Any] = {"steps": STEPS, "seeds": {}}
    for seed in options.seeds:
        runs = {"clean": train(seed, "clean", True, train_rows, held_out)}
        for kind in options.kinds:
            for guarded in (True, False):
                runs[f"{kind} {'guarded' if guarded else 'unguarded'}"] = train(seed, kind, guarded, train_rows, held_out)
        for run in runs.values():
            run["over_clean"] = round(run["loss"] / runs["clean"]["loss"] - 1, 4)
        result["seeds"][seed] = runs
        if not options.json:
            for name, run in runs.items():
                print(f"seed {seed}  {name:20} held-out loss {run['loss']:.4f}  {run['over_clean']:+.2%}  {run['counts']}")
    finish(result, options.json)


if __name__ == "__main__":
    main()
