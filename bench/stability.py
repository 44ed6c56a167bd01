"""A run that is hit by a poisoned document, by a NaN in a gradient, or by a learning rate that diverges: held-out loss with the guard
and without it, against the run that nothing hit. A byte-level model on Python's standard library."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import finish

from pascaline.data.batch import Batch, Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.data.sources import documents
from pascaline.errors import BadInput
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.recipe import Guard as Rule
from pascaline.recipe import Stage
from pascaline.train.guard import Guard
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss, token_logprobs

ROW, ROWS, STEPS, PAD = 128, 8, 300, 256
LR, TOO_FAST = 4e-3, 8  # the peak rate, and how many times it in the run that diverges
RULE = Rule(patience=20, margin=0.15)
CONFIG = ModelConfig(
    vocab_size=257, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, moe_intermediate_size=32,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, initializer_range=0.05,
)  # fmt: skip


class Unguarded(Guard):
    def judge(self, rule: Rule, loss: float | None, norm: float) -> str:
        return ""

    def drifted(self, rule: Rule) -> bool:
        return False


class Injected:
    """The clean data, and at some of its steps what is not clean. Keyed by the data's own number, as a bad document would be."""

    def __init__(self, loader: Loader, model: Model, kind: str):
        self.loader, self.model, self.kind, self.facts = loader, model, kind, loader.facts

    def step(self, step: int) -> list[Batch]:
        batches = self.loader.step(step)
        if self.kind == "poison" and 250 <= step < 256:  # a document of noise, six steps long
            for batch in batches:
                batch.tokens = torch.randint(0, 256, batch.tokens.shape, generator=torch.Generator().manual_seed(step))
        if self.kind == "nan" and step == 200:
            hook = self.model.model.norm.weight.register_hook(lambda gradient: (hook.remove(), gradient * float("nan"))[1])
        return batches

    def documents(self, step: int) -> list[Any]:
        return self.loader.documents(step)


def texts(count: int = 2_000_000) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out rows of bytes; every tenth file is held out."""
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for i, document in enumerate(documents(["stdlib"], count, lambda _: None)):
        data = np.frombuffer(document.text.encode(), np.uint8).astype(np.int64)
        rows = [data[at : at + ROW] for at in range(0, len(data), ROW)]
        parts[i % 10 == 9].extend(Sample(row, {"ce": np.ones(len(row), np.float32)}) for row in rows if len(row) > 1)
    return parts


@torch.no_grad()
def held_out_loss(model: Model, samples: list[Sample]) -> float:
    """Mean nats a byte over the first 512 rows."""
    total = count = 0.0
    loader = Loader(ListSamples(samples), ROW, 64, 64, PAD, 0)
    for step in range(8):
        (batch,) = loader.step(step)
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        logprob, _, _ = token_logprobs(hidden[:, :-1].flatten(0, 1), model.head_weight, batch.tokens[:, 1:].flatten())
        weight = batch.streams["ce"][:, 1:].flatten()
        total, count = total - float((weight * logprob).sum()), count + float(weight.sum())
    return total / count


def train(seed: int, kind: str, guarded: bool, train_rows: list[Sample], held_out: list[Sample]) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Model(CONFIG).init_(seed)
    rate = LR * TOO_FAST if kind == "rate" else LR
    stage = Stage(sequence_length=ROW, lr=rate, warmup=120, decay=0.3, final=0.02, save_every=20, keep_last=8, guard=RULE, mtp=0.0)
    loader = Loader(ListSamples(train_rows), ROW, ROWS, ROWS, PAD, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, stage, Loss(), Path(folder), f"{kind} {'guarded' if guarded else 'unguarded'}", torch.float32)
        trainer.guard = Guard() if guarded else Unguarded()
        try:
            trainer.run(Injected(loader, model, kind), STEPS, quiet=True)
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
