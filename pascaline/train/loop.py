"""The one training loop, for pre-training, SFT and RL alike: it never asks where a batch came from.

State is (seed, step) plus tensors: a source gives the same batches for the same step and weights, so a killed run that goes on from
its last checkpoint ends with the same bits.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pascaline.data.batch import Batch
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.transformer import Model
from pascaline.progress import Progress
from pascaline.recipe import Stage
from pascaline.runs import Metrics
from pascaline.stopping import Interrupt, Stopped
from pascaline.train import checkpoint, losses
from pascaline.train.optim import Optimizer
from pascaline.train.schedule import learning_rate


class Source(Protocol):
    """Where an optimizer step's micro-batches come from. `facts` describe the last step (reward, response length, ...)."""

    facts: dict[str, Any]

    def step(self, step: int) -> list[Batch]: ...


@dataclass
class Totals:
    """What a stage has cost so far, over all its resumes."""

    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0


class Trainer:
    """Trains `model` for `steps` optimizer steps in `folder`; the finished weights go to folder/model in float32."""

    def __init__(self, model: Model, stage: Stage, rule: losses.Loss, folder: Path, name: str, dtype: torch.dtype):
        self.model, self.stage, self.rule, self.folder, self.name = model, stage, rule, folder, name
        self.optimizer = Optimizer(model, stage, dtype)
        self.routers = model.routers()
        self.flops_per_token = 6.0 * active_parameters(model)
        self.totals = Totals()

    def run(self, source: Source, steps: int, quiet: bool = False) -> Totals:
        """Resume if there is a checkpoint, train to the end, write folder/model.

        Raises Stopped on SIGINT or SIGTERM once the step in progress is saved, BadInput on a non-finite loss or gradient.
        """
        first = self._resume()
        with (
            Metrics(self.folder / "metrics.jsonl") as metrics,
            Interrupt() as interrupt,
            Progress(self.name, steps, enabled=not quiet) as progress,
        ):
            for step in range(first, steps):
                began = time.perf_counter()
                row = self._step(source, step, steps)
                seconds = time.perf_counter() - began
                self.totals.seconds += seconds
                row |= {"tokens_per_s": row["tokens"] / seconds, "seconds": self.totals.seconds}
                metrics.append({"step": step, **row})
                progress.update(
                    step + 1, **{k: row[k] for k in ("reward", "accuracy", "response_tokens", "loss", "tokens_per_s") if k in row}
                )
                last = step + 1 == steps
                if last or interrupt.requested or (step + 1) % self.stage.save_every == 0:
                    metrics.sync()
                    checkpoint.save(self.folder, step + 1, self._tensors(), {"totals": vars(self.totals)})
                if interrupt.requested and not last:
                    raise Stopped(f"stopped after {self.name} step {step + 1} of {steps}")
        hf.save(self.folder / "model", self.model.config, self.full_precision(), torch.float32)
        return self.totals

    def _step(self, source: Source, step: int, steps: int) -> dict[str, Any]:
        """One optimizer step; what to log of it."""
        batches = source.step(step)
        row: dict[str, Any] = {**source.facts, "tokens": sum(int((b.document_ids >= 0).sum()) for b in batches)}
        self.totals.tokens += row["tokens"]
        self.totals.flops += row["tokens"] * self.flops_per_token + row.get("rollout_flops", 0.0)
        if not batches:  # a rollout without any signal: nothing to learn from, said in the log
            return {**row, "loss": 0.0, "skipped": True}
        total = losses.totals(batches)
        if not any(total.values()):
            raise BadInput(f"{self.name} step {step}: no token carries any weight, so there is nothing to learn; check the masks.")
        logs: dict[str, Tensor] = {}
        load_LE = torch.zeros(())
        for batch in batches:
            loss, parts, loads = losses.compute(self.model, batch.to(self.model.device), total, self.rule)
            loss.backward()
            self.optimizer.collect()
            logs = {name: logs.get(name, 0) + part for name, part in parts.items()}
            load_LE = load_LE + loads
        row |= {name: float(value) for name, value in logs.items()}
        row["loss"] = sum(row[name] for name in ("ce", "rl", "kl", "mtp") if name in row)
        row["lr"] = learning_rate(self.stage, step, steps)
        row["grad_norm"] = self.optimizer.step(row["lr"])
        if not math.isfinite(row["loss"]) or not math.isfinite(row["grad_norm"]):
            raise BadInput(
                f"{self.name} step {step}: the loss is {row['loss']:.3g} and the gradient norm {row['grad_norm']:.3g}; the last "
                f"checkpoint's weights are kept, lower {self.name}.lr (now {self.stage.lr:g}) or look at the data."
            )
        if self.stage.balance_rate:
            for router, load in zip(self.routers, load_LE, strict=False):  # the MTP modules', last, only run under their loss
                router.balance(load, self.stage.balance_rate)
        if load_LE.dim() == 2 and len(load_LE):
            share_LE = load_LE / load_LE.sum(1, keepdim=True)
            row["max_violation"] = float((share_LE * share_LE.shape[1]).max() - 1)  # MaxVio of arXiv 2408.15664
            row["expert_load"] = [[round(float(s), 4) for s in layer] for layer in share_LE]
        return row

    def full_precision(self) -> dict[str, Tensor]:
        """The model's tensors with the float32 masters in place of the working copies."""
        return {**self.model.state_dict(), **{name: m.data for name, m in self.optimizer.masters.items()}}

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.optimizer.state(), **{f"buffer.{n}": b for n, b in self.model.named_buffers()}}

    def _resume(self) -> int:
        """Load the latest checkpoint, if any; the step to go on with."""
        path = checkpoint.latest(self.folder)
        step = 0
        if path is not None:
            tensors, facts = checkpoint.load(path)
            self.optimizer.load_state(tensors)
            for name, buffer in self.model.named_buffers():
                buffer.copy_(tensors[f"buffer.{name}"])
            self.totals = Totals(**facts["totals"])
            step = int(facts["step"])
        Metrics(self.folder / "metrics.jsonl").truncate_after(step - 1)
        return step


def active_parameters(model: Model) -> float:
    """Parameters that take part in a token's matmuls: routed experts by their share, the head, not the embedding's lookup."""
    c = model.config
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(s for name, s in sizes.items() if ".experts." in name)
    active = sum(sizes.values()) - routed + routed * c.num_experts_per_tok / c.n_routed_experts
    return active if c.tie_word_embeddings else active - c.vocab_size * c.hidden_size
