"""The one training loop, for pre-training, SFT and RL alike: it never asks where a batch came from.

State is (seed, step) plus tensors: a source gives the same batches for the same step and weights, so a killed run that goes on from
its last checkpoint ends with the same bits.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from pascaline.data.batch import Batch
from pascaline.errors import BadInput
from pascaline.ledger import Totals
from pascaline.model import hf
from pascaline.model.transformer import Model
from pascaline.progress import Progress
from pascaline.recipe import Stage
from pascaline.runs import Metrics, disk_full
from pascaline.stopping import Interrupt, Stopped
from pascaline.train import checkpoint, losses, quarantine, schedule
from pascaline.train.guard import Guard
from pascaline.train.optim import Optimizer
from pascaline.train.qkclip import QKClip
from pascaline.train.sinks import Sinks

SHOWN = ("reward", "accuracy", "response_tokens", "loss", "tokens_per_s", "gemm_share", "mfu", "grad_norm", "max_violation", "dead_experts")


class Source(Protocol):
    """Where an optimizer step's micro-batches come from. `facts` describe the last step (reward, response length, ...); `documents`
    tells for each of its micro-batches what stands in row b as document d, {(b, d): {"source": ..., ...}}."""

    facts: dict[str, Any]

    def step(self, step: int) -> list[Batch]: ...

    def documents(self, step: int) -> list[quarantine.Names]: ...


class Trainer:
    """Trains `model` for `steps` optimizer steps in `folder`; the finished weights go to folder/model in float32."""

    def __init__(self, model: Model, stage: Stage, rule: losses.Loss, folder: Path, name: str, dtype: torch.dtype):
        self.model, self.stage, self.rule, self.folder, self.name = model, stage, rule, folder, name
        self.model.activation_checkpointing = stage.activation_checkpointing
        self.optimizer = Optimizer(model, stage, dtype)
        self.clipping = QKClip(model, self.optimizer, stage.qk_clip)
        self.routers = model.routers()
        self.flops_per_token = 6.0 * active_parameters(model)
        self.totals = Totals()  # of the steps that stand, over all resumes
        self.spent = Totals()  # of this process, with the steps that a rewind threw away
        self.peak = 0.0  # FLOP/s of matrix products here; 0: not measured
        self.sinks = Sinks()
        self.guard = Guard()
        self.metrics = Metrics(folder / "metrics.jsonl")
        self.rows: list[dict[str, Any]] = []  # that still have to go there: a full disk may get room again

    def run(self, source: Source, steps: int, quiet: bool = False) -> Totals:
        """Resume if there is a checkpoint, train to the end, write folder/model.

        Raises Stopped on SIGINT or SIGTERM once the step in progress is saved, BadInput if the guard gives up.
        """
        shown = Progress(self.name, steps, enabled=not quiet)
        with self.metrics, Interrupt() as interrupt, shown as progress, self.sinks.open(progress.note):
            step = self._resume(progress)
            while step < steps:
                began, flops = time.perf_counter(), self.spent.flops
                row = self._step(source, step, steps, progress)
                seconds = time.perf_counter() - began
                self._count(seconds=seconds)
                row |= {"tokens_per_s": row["tokens"] / seconds, "seconds": self.totals.seconds}
                if self.peak:
                    name = "mfu" if self.model.device.type == "cuda" else "gemm_share"
                    row[name] = (self.spent.flops - flops) / seconds / self.peak
                self.rows.append({"step": step, **row})
                self._log(progress)
                step += 1
                progress.update(step, **{k: row[k] for k in SHOWN if k in row}, **self.guard.counts)
                if self.guard.drifted(self.stage.guard):  # before a save: a resumed run must not miss it
                    step = self._rewind(step, progress)
                elif step == steps or interrupt.requested or step % self.stage.save_every == 0:
                    self._save(step, progress, must=step == steps or interrupt.requested)
                if interrupt.requested and step < steps:
                    raise Stopped(f"stopped after {self.name} step {step} of {steps}")
        hf.save(self.folder / "model", self.model.config, self.full_precision(), torch.float32)
        return self.totals

    def _step(self, source: Source, step: int, steps: int, progress: Progress) -> dict[str, Any]:
        """One optimizer step; what to log of it."""
        batches = source.step(step + self.guard.shift)
        row: dict[str, Any] = {**source.facts, "tokens": sum(int((b.document_ids >= 0).sum()) for b in batches)}
        self._count(tokens=row["tokens"], flops=row["tokens"] * self.flops_per_token + row.get("rollout_flops", 0.0))
        if not batches:  # a rollout without any signal: nothing to learn from, said in the log
            return {**row, "loss": 0.0, "skipped": True}
        total = losses.totals(batches)
        if not any(total.get(name) for name in losses.WEIGHTS):
            raise BadInput(f"{self.name} step {step}: no token carries any weight, so there is nothing to learn; check the masks.")
        logs: dict[str, Tensor] = {}
        load_LE = torch.zeros(())
        self.clipping.watch()
        rule = replace(self.rule, mtp=schedule.mtp_weight(self.stage, step, steps) if self.rule.mtp else 0.0)
        for batch in batches:
            loss, parts, loads = losses.compute(self.model, batch.to(self.model.device), total, rule)
            loss.backward()
            self.optimizer.collect()
            logs = {name: logs.get(name, 0) + part for name, part in parts.items()}
            load_LE = load_LE + loads
        row |= {name: value.item() if value.dim() == 0 else [round(v, 4) for v in value.tolist()] for name, value in logs.items()}
        row["loss"] = sum(row[name] for name in losses.PARTS if name in row)
        row["lr"] = schedule.learning_rate(self.stage, step, steps) * self.guard.slower
        norm = self.optimizer.norm()
        row["grad_norm"] = float(norm)
        if self._skip(source, step, batches, row, progress):
            return row
        self.optimizer.step(row["lr"], norm)
        if self.stage.qk_clip:
            row["max_logit"] = self.clipping.clip()
        if rate := schedule.balance_rate(self.stage, step, steps):
            for router, load in zip(self.routers, load_LE, strict=False):  # the MTP modules', last, only run under their loss
                router.balance(load, rate)
        if load_LE.dim() == 2 and len(load_LE):
            share_LE = load_LE / load_LE.sum(1, keepdim=True)
            row["max_violation"] = float((share_LE * share_LE.shape[1]).max() - 1)  # MaxVio of arXiv 2408.15664
            row["dead_experts"] = int((load_LE == 0).sum())
            row["expert_load"] = [[round(float(s), 4) for s in layer] for layer in share_LE]
        return row

    def _skip(self, source: Source, step: int, batches: list[Batch], row: dict[str, Any], progress: Progress) -> bool:
        """Whether the guard forbids this step's update; then the gradients are dropped, the reason is in `row` and the documents in
        quarantine.jsonl. BadInput when too many steps in a row are not finite."""
        norm = row["grad_norm"] if math.isfinite(row["loss"]) else math.nan
        reason = self.guard.judge(self.stage.guard, row.get("ce"), norm)
        if not reason:
            return False
        self.optimizer.drop()
        if reason == "non-finite" and self.guard.in_row >= self.stage.guard.max_skips:
            raise BadInput(
                f"{self.name} step {step}: the loss is {row['loss']:.3g} and the gradient norm {row['grad_norm']:.3g}, for the "
                f"{self.guard.in_row}th time in a row; lower {self.name}.lr (now {self.stage.lr:g}) or look at the data."
            )
        row |= {"guard": reason, "skipped": True}
        documents = quarantine.suspects(self.model, batches, source.documents(step + self.guard.shift))
        quarantine.record(self.folder / "quarantine.jsonl", {"step": step, "reason": reason, "documents": documents})
        progress.note(f"step {step} skipped, {reason} (loss {row['loss']:.3g}, gradient norm {row['grad_norm']:.3g})")
        return True

    def _rewind(self, step: int, progress: Progress) -> int:
        """Back to the last checkpoint from before the loss began to rise, if there still is one; the step to go on with."""
        rule, counts = self.stage.guard, self.guard.counts
        trouble = f"{self.name} step {step}: the loss has been more than {rule.margin:g} above its best {self.guard.best:.3g} for " \
                  f"{rule.patience} steps"  # fmt: skip
        saved = checkpoint.steps(self.folder)
        if counts.get("rewind", 0) >= rule.rewinds or not saved:
            raise BadInput(f"{trouble}, and {rule.rewinds} rewinds did not help; lower {self.name}.lr (now {self.stage.lr:g}), clip "
                           f"harder ({self.name}.clip), or look at the data.")  # fmt: skip
        early = [s for s in saved if s <= step - self.guard.since_best] or saved[:1]
        before = self._restore(reversed(early), progress)
        self.guard.counts = counts
        self.guard.rewound(step - before)
        checkpoint.forget_after(self.folder, before)
        self.metrics.truncate_after(before - 1)
        self._save(before, progress, must=True)
        progress.note(f"{trouble}; back to step {before}, its data left out, learning rate x {self.guard.slower:g}")
        return before

    def _save(self, step: int, progress: Progress, must: bool) -> None:
        """Write a checkpoint. A full disk is an error only if it `must` be written; else the run goes on without."""
        facts = {"totals": vars(self.totals), "guard": self.guard.facts()}
        try:
            self._log(None)
            self.metrics.sync()
            checkpoint.save(self.folder, step, self._tensors(), facts, self.stage.keep_last, self.stage.keep_every)
        except (OSError, SafetensorError) as e:
            if must or not disk_full(e):
                raise
            progress.note(f"no checkpoint at step {step}, the disk is full; going on, the one before stays")

    def _log(self, progress: Progress | None) -> None:
        """Append the waiting rows to metrics.jsonl; on a full disk they go on waiting (an error without `progress` to say it)."""
        try:
            while self.rows:
                self.metrics.append(self.rows[0])
                self.sinks.log(self.rows.pop(0))
        except OSError as e:
            if progress is None or not disk_full(e):
                raise
            if len(self.rows) == 1:
                progress.note("the disk is full; going on, metrics.jsonl is written when there is room")

    def _count(self, seconds: float = 0.0, tokens: int = 0, flops: float = 0.0) -> None:
        for totals in (self.totals, self.spent):
            totals.add(seconds, tokens, flops)

    def full_precision(self) -> dict[str, Tensor]:
        """The model's tensors with the float32 masters in place of the working copies."""
        return {**self.model.state_dict(), **{name: m.data for name, m in self.optimizer.masters.items()}}

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.optimizer.state(), **{f"buffer.{n}": b for n, b in self.model.named_buffers()}}

    def _resume(self, progress: Progress) -> int:
        """Load the newest checkpoint, if any; the step to go on with."""
        step = self._restore(reversed(checkpoint.steps(self.folder)), progress)
        checkpoint.forget_after(self.folder, step)
        self.metrics.truncate_after(step - 1)
        return step

    def _restore(self, choices: Iterable[int], progress: Progress) -> int:
        """Load the first of these checkpoints that is undamaged; its step, or 0 without any."""
        found = checkpoint.load(self.folder, choices, progress.note)
        if found is None:
            return 0
        tensors, facts = found
        self.optimizer.load_state(tensors)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
        self.totals, self.guard = Totals(**facts["totals"]), Guard.of(facts["guard"])
        return int(facts["step"])


def active_parameters(model: Model) -> float:
    """Parameters that take part in a token's matmuls: routed experts by their share, the head, not the embedding's lookup."""
    c = model.config
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(s for name, s in sizes.items() if ".experts." in name)
    active = sum(sizes.values()) - routed + routed * c.num_experts_per_tok / c.n_routed_experts
    return active if c.tie_word_embeddings else active - c.vocab_size * c.hidden_size
