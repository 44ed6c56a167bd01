"""The one training loop, for pre-training, SFT and RL alike: it never asks where a batch came from.

State is (seed, step) plus tensors: a source gives the same batches for the same step and weights, so a killed run that goes on from
its last checkpoint ends with the same bits.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from pascaline.runs import Metrics, disk_full
from pascaline.stopping import Interrupt
from pascaline.tables import Stage
from pascaline.train import checkpoint, losses, metrics, parallel, paths, quarantine, schedule, straggler
from pascaline.train.guard import Guard, within
from pascaline.train.optim import Optimizer
from pascaline.train.parallel import ALONE, Ranks, Rows
from pascaline.train.qkclip import QKClip
from pascaline.train.sinks import Sinks


class Source(Protocol):
    """Where an optimizer step's micro-batches come from. `facts` describe the last step (reward, response length, ...); `documents`
    tells for each of its micro-batches what stands in row b as document d, {(b, d): {"source": ..., ...}}."""

    facts: dict[str, Any]

    def step(self, step: int) -> list[Batch]: ...

    def documents(self, step: int) -> list[quarantine.Names]: ...


@dataclass
class Launched:
    """A step that the device may still be at. row: what is known of it already; names and values: the rest, on its way to the host."""

    step: int
    began: float
    row: dict[str, Any]
    batches: list[Batch]
    limits: tuple[float, float]
    names: dict[str, torch.Size]
    values: Tensor
    arrived: torch.Event | None
    own: straggler.Spans
    fetched: float  # when its batches were there


class Trainer:
    """Trains `model` for `steps` optimizer steps in `folder`; the finished weights go to folder/model in float32.

    On several `ranks` each has a trainer with the same model, and a source that gives its share of each step's batches; that model may
    be without memory, and is filled with the rows of `first` then (train/initial.py).
    """

    def __init__(
        self,
        model: Model,
        stage: Stage,
        rule: losses.Loss,
        folder: Path,
        name: str,
        dtype: torch.dtype,
        ranks: Ranks = ALONE,
        first: Rows | None = None,
    ):
        self.model, self.stage, self.rule, self.folder, self.name, self.ranks = model, stage, rule, folder, name, ranks
        self.model.activation_checkpointing = stage.activation_checkpointing
        self.paths = paths.take(model, stage, dtype, ranks.device)
        self.flops_per_token = 6.0 * active_parameters(model)
        # Runs a function of the model where its weights are whole.
        self.on_model = partial(_call, model) if ranks.size == 1 else parallel.shard(model, dtype, ranks, first)
        self.stopwatch = straggler.Stopwatch(model) if ranks.size > 1 else None
        self.stragglers = straggler.Stragglers()
        self.optimizer = Optimizer(model, stage, dtype, ranks, rule.mtp_apart)
        self.clipping = QKClip(model, self.optimizer, stage.qk_clip)
        self.routers = model.routers()
        self.totals = Totals()  # of the steps that stand, over all resumes
        self.spent = Totals()  # of this process, with the steps that a rewind threw away
        self.peak = 0.0  # FLOP/s of matrix products here; 0: not measured
        self.sinks = Sinks()
        self.watch: metrics.Watch | None = None
        self.guard = Guard()
        self.saver = checkpoint.Saver(folder, stage.keep_last, stage.keep_every, ranks)
        self.metrics = Metrics(folder / "metrics.jsonl")
        self.rows: list[dict[str, Any]] = []  # that still have to go there: a full disk may get room again
        self.launched: list[Launched] = []
        self.settled = 0.0  # when the last one was
        self.lag = 0 if model.device.type in ("cpu", "mps") else 1  # steps that run ahead of what the host knows

    def run(self, source: Source, steps: int, quiet: bool = False) -> Totals:
        """Resume if there is a checkpoint, train to the end, write folder/model.

        Raises Stopped on SIGINT or SIGTERM once the step in progress is saved, BadInput if the guard gives up.
        """
        quiet = quiet or not self.ranks.leader
        shown = Progress(self.name, steps, enabled=not quiet)
        with self.metrics, self.saver, Interrupt() as interrupt, shown as progress, self.sinks.open(progress.note):
            if self.ranks.size > 1:
                progress.note(str(self.ranks))
            for line in self.paths:
                progress.note(line)
            step = self._resume(progress)
            while step < steps:
                self._launch(source, step, steps, interrupt)
                step += 1
                border = step == steps or step % self.stage.save_every == 0
                asked = self._settle(source, 0 if border else self.lag, progress)
                if self.guard.drifted(self.stage.guard):  # before a save: a resumed run must not miss it
                    self.launched.clear()
                    step = self._rewind(step, progress)
                elif border or asked:
                    self._settle(source, 0, progress)
                    self._save(step, progress, must=step == steps or asked)
                elif self.saver.finished:
                    self._saved(progress, must=False)
                if asked and step < steps:
                    raise interrupt.stopped(f"stopped after {self.name} step {step} of {steps}")
        if self.ranks.leader:
            hf.save(self.folder / "model", self.model.config, self.tensors(), torch.float32)
        else:
            for _ in self.tensors():  # the first rank gets all of each only if all ranks ask
                pass
        return self.totals

    def _launch(self, source: Source, step: int, steps: int, interrupt: Interrupt) -> None:
        """One optimizer step, without waiting for the device."""
        began = time.perf_counter()
        if self.stopwatch:
            self.stopwatch.start()
        batches = source.step(step + self.guard.shift)
        fetched = time.perf_counter()
        if self.stopwatch:
            self.stopwatch.pause()
        total = self._totals(batches)
        row: dict[str, Any] = {**source.facts, "tokens": int(total["tokens"])}
        rule = replace(self.rule, mtp=schedule.mtp_weight(self.stage, step, steps) if self.rule.mtp else 0.0)
        limits = self.guard.limits(self.stage.guard)
        values: dict[str, Tensor] = {}
        if batches:  # else a rollout without any signal: nothing to learn from, said in the log
            if not any(total[name] for name in losses.WEIGHTS):
                raise BadInput(f"{self.name} step {step}: no token carries any weight, so there is nothing to learn; check the masks.")
            self.clipping.watch()
            for batch in batches:
                loss, parts, loads = self.on_model(losses.compute, batch, total, rule)
                loss.backward()
                self.optimizer.collect()
                for name, part in {**parts, "load": loads}.items():
                    values[name] = metrics.combined(name, values[name], part) if name in values else part
            row["lr"] = schedule.learning_rate(self.stage, step, steps) * self.guard.slower
            values = self._update(step, steps, row["lr"], limits, values)
        values["asked"] = self.ranks.sum(torch.full((), float(interrupt.requested), device=self.model.device))
        flat, arrived = _to_host(torch.cat([value.detach().flatten().float() for value in values.values()]))
        names = {name: value.shape for name, value in values.items()}
        own = self.stopwatch.spans if self.stopwatch else []
        self.launched.append(Launched(step, began, row, batches, limits, names, flat, arrived, own, fetched))

    def _totals(self, batches: list[Batch]) -> dict[str, float]:
        """The weight of each stream over all ranks' batches of a step, and their tokens."""
        found = self.ranks.gather(losses.totals(batches))
        return {name: sum(own[name] for own in found) for name in found[0]}

    def _update(self, step: int, steps: int, lr: float, limits: tuple[float, float], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Combine `values` of all ranks and change the weights with the collected gradients, unless they are out of the guard's limits:
        then this changes nothing. The values with what came of it."""
        values = metrics.over_ranks(self.ranks, values)
        values["loss"] = torch.stack([values[name] for name in losses.PARTS if name in values]).sum()
        values["grad_norm"] = norm = self.optimizer.norm()
        fine = within(limits, values.get("ce"), values["loss"], norm)
        self.optimizer.step(lr, norm, fine)
        if self.stage.qk_clip:
            values["max_logit"] = self.clipping.clip(fine)
        if rate := schedule.balance_rate(self.stage, step, steps):
            for router, load in zip(self.routers, values["load"], strict=False):  # the MTP modules', last, only run under their loss
                router.balance(load, rate, fine)
        return values

    def _settle(self, source: Source, running: int, progress: Progress) -> bool:
        """Hear of the launched steps but the last `running`: judge and log them. Whether any rank was asked to stop."""
        asked = False
        while len(self.launched) > running:
            one = self.launched.pop(0)
            told = _arrived(one)
            asked |= bool(told.pop("asked"))
            row = metrics.read(one.row, told)
            if "loss" in told:
                self._judge(source, one, row, progress)
            if self.stopwatch:
                row |= self._compare(one.own, progress)
            self._count(one, row, progress)
        return asked

    def _judge(self, source: Source, one: Launched, row: dict[str, Any], progress: Progress) -> None:
        """If the guard left out this step, put the reason into `row` and the documents into quarantine.jsonl. BadInput when too many
        steps in a row are not finite."""
        norm = row["grad_norm"] if math.isfinite(row["loss"]) else math.nan
        reason = self.guard.judge(self.stage.guard, row.get("ce"), norm, one.limits)
        if not reason:
            return
        if reason == "non-finite" and self.guard.in_row >= self.stage.guard.max_skips:
            raise BadInput(
                f"{self.name} step {one.step}: the loss is {row['loss']:.3g} and the gradient norm {row['grad_norm']:.3g}, for the "
                f"{self.guard.in_row}th time in a row; lower {self.name}.lr (now {self.stage.lr:g}) or look at the data."
            )
        row |= {"guard": reason, "skipped": True}
        with torch.no_grad():
            own = self.on_model(quarantine.suspects, one.batches, source.documents(one.step + self.guard.shift))
        documents = quarantine.worst(self.ranks.gather(own))
        if self.ranks.leader:
            quarantine.record(self.folder / "quarantine.jsonl", {"step": one.step, "reason": reason, "documents": documents})
        progress.note(f"step {one.step} skipped, {reason} (loss {row['loss']:.3g}, gradient norm {row['grad_norm']:.3g})")

    def _compare(self, own: straggler.Spans, progress: Progress) -> dict[str, Any]:
        """How long each rank took for its own work in a step."""
        times = self.ranks.gather(straggler.seconds(own))
        ratio, note = self.stragglers.judge(times)
        if note:
            progress.note(note)
        shown = {"slowest_per_median": round(ratio, 3)} if ratio >= straggler.SHOWN else {}
        return {"rank_seconds": [float(f"{seconds:.4g}") for seconds in times], **shown}

    def _count(self, one: Launched, row: dict[str, Any], progress: Progress) -> None:
        """Add the step to the totals, the metrics and the progress line."""
        now = time.perf_counter()
        seconds, self.settled = now - max(one.began, self.settled), now
        flops = row["tokens"] * self.flops_per_token + row.get("rollout_flops", 0.0)
        for totals in (self.totals, self.spent):
            totals.add(seconds, row["tokens"], flops)
        row |= {"tokens_per_s": row["tokens"] / seconds, "seconds": self.totals.seconds}
        if self.peak:
            row["mfu" if self.model.device.type == "cuda" else "gemm_share"] = flops / seconds / self.peak
        if "rollout_seconds" in row:
            row |= metrics.spent(row, seconds, now - one.fetched)
        names, notes, stop = self.watch.look(row) if self.watch else ([], [], "")
        row |= {"alarms": names} if names else {}
        if self.ranks.leader:
            self.rows.append(metrics.ordered({"step": one.step, **row}))
            self._log(progress)
        progress.update(one.step + 1, **metrics.shown(row), **self.guard.counts)
        for note in notes:
            progress.note(f"step {one.step}: {note}")
        if stop:
            raise BadInput(f"{self.name} step {one.step}: {stop}")

    def _rewind(self, step: int, progress: Progress) -> int:
        """Back to the last checkpoint from before the loss began to rise, if there still is one; the step to go on with."""
        rule, counts = self.stage.guard, self.guard.counts
        trouble = f"{self.name} step {step}: the loss has been more than {rule.margin:g} above its best {self.guard.best:.3g} for " \
                  f"{rule.patience} steps"  # fmt: skip
        self._saved(progress, must=False)
        saved = checkpoint.steps(self.folder)
        if counts.get("rewind", 0) >= rule.rewinds or not saved:
            raise BadInput(f"{trouble}, and {rule.rewinds} rewinds did not help; lower {self.name}.lr (now {self.stage.lr:g}), clip "
                           f"harder ({self.name}.clip), or look at the data.")  # fmt: skip
        early = [s for s in saved if s <= step - self.guard.since_best] or saved[:1]
        before = self._restore(reversed(early), progress)
        self.guard.counts = counts
        self.guard.rewound(step - before)
        self._forget_after(before)
        self._save(before, progress, must=True)
        progress.note(f"{trouble}; back to step {before}, its data left out, learning rate x {self.guard.slower:g}")
        return before

    def _save(self, step: int, progress: Progress, must: bool) -> None:
        """Begin to write a checkpoint, and wait for it if it `must` be written. A full disk is an error only then; else the run goes on
        without."""
        self._saved(progress, must=False)
        facts = {"totals": asdict(self.totals), "guard": self.guard.facts()}  # copies: they are written while training goes on
        trouble: OSError | None = None
        try:
            self._log(None)
            self.metrics.sync()
        except OSError as e:
            trouble = e
        trouble = next((found for found in self.ranks.gather(trouble) if found), None)
        if trouble is None:
            self.saver.save(step, self._tensors(), facts)
            if must:
                self._saved(progress, must)
        elif must or not disk_full(trouble):
            raise trouble
        else:
            progress.note(f"no checkpoint at step {step}, the disk is full; going on, the one before stays")

    def _saved(self, progress: Progress, must: bool) -> None:
        """Wait for the checkpoint that is being written, if any."""
        try:
            self.saver.wait()
        except (OSError, SafetensorError) as e:
            if must or not disk_full(e):
                raise
            progress.note(f"no checkpoint at step {self.saver.step}, the disk is full; going on, the one before stays")

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

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors on the host, one at a time, with the float32 masters in place of the working copies; of several ranks'
        shares the whole, for which all of them have to ask."""
        yield from self.model.named_buffers()
        for name, master in self.optimizer.masters.items():
            yield name, parallel.full(parallel.like(master.data, self.optimizer.wholes[name])).cpu()

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.optimizer.state(), **{f"buffer.{n}": b for n, b in self.model.named_buffers()}}

    def _resume(self, progress: Progress) -> int:
        """Load the newest checkpoint, if any; the step to go on with."""
        step = self._restore(reversed(checkpoint.steps(self.folder)), progress)
        self._forget_after(step)
        return step

    def _forget_after(self, step: int) -> None:
        if self.ranks.leader:
            checkpoint.forget_after(self.folder, step)
            self.metrics.truncate_after(step - 1)
            if self.watch:
                self.watch.begin(Metrics.read(self.metrics.path))
        self.ranks.tell()

    def _restore(self, choices: Iterable[int], progress: Progress) -> int:
        """Load the first of these checkpoints that is undamaged; its step, or 0 without any."""

        def room(names: set[str]) -> dict[str, Tensor]:
            return {**self.optimizer.room(names), **{f"buffer.{n}": b for n, b in self.model.named_buffers()}}

        facts = checkpoint.load(self.folder, choices, room, progress.note, self.ranks)
        if facts is None:
            return 0
        self.optimizer.reload()
        self.totals, self.guard = Totals(**facts["totals"]), Guard.of(facts["guard"])
        return int(facts["step"])


def _call(model: Model, work: Callable[..., Any], *arguments: Any) -> Any:
    return work(model, *arguments)


def _to_host(flat: Tensor) -> tuple[Tensor, torch.Event | None]:
    """A copy on its way to the host, and the event of its arrival; a wait for the tensor itself would wait for the next step too."""
    if flat.device.type in ("cpu", "mps"):
        return flat, None
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    arrived = torch.Event(flat.device)
    arrived.record()
    return host, arrived


def _arrived(one: Launched) -> dict[str, Any]:
    """A launched step's values as numbers and nested lists."""
    if one.arrived is not None:
        one.arrived.synchronize()
    parts = one.values.split([shape.numel() for shape in one.names.values()])
    return {name: part.view(shape).tolist() for (name, shape), part in zip(one.names.items(), parts, strict=True)}


def active_parameters(model: Model) -> float:
    """Parameters that take part in a token's matmuls: routed experts by their share, the head, not the embedding's lookup."""
    c = model.config
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(s for name, s in sizes.items() if ".experts." in name)
    active = sum(sizes.values()) - routed + routed * c.num_experts_per_tok / max(c.n_routed_experts, 1)
    return active if c.tie_word_embeddings else active - c.vocab_size * c.hidden_size


def forward_flops(model: Model, tokens: int) -> float:
    """Of reading so many tokens: 2 for each active parameter."""
    return 2.0 * active_parameters(model) * tokens
