"""What every stage of a chain stands on: the run's folders, and training in one of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pascaline.data.loader import Loader, Samples
from pascaline.device import peak
from pascaline.ledger import Attempt, stage_cost
from pascaline.model.transformer import Model
from pascaline.progress import Progress
from pascaline.recipe import Recipe
from pascaline.runs import lineage
from pascaline.tables import Stage, kind
from pascaline.tokenizer import Tokenizer
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss
from pascaline.train.metrics import Watch
from pascaline.train.parallel import ALONE, Ranks, Rows
from pascaline.train.policy import Policy
from pascaline.train.preference import Preference
from pascaline.train.sinks import Sinks

TOGETHER = ("pretrain", "extend", "sft")  # kinds of stages that all ranks work at; the leader does the others alone


@dataclass
class Run:
    """A resolved recipe in its folder."""

    recipe: Recipe
    out: Path
    device: torch.device
    dtype: torch.dtype
    quiet: bool = False
    ranks: Ranks = ALONE
    attempt: Attempt | None = None  # at the stage under way

    def folder(self, stage: str) -> Path:
        return self.out / f"{self.recipe.stages.index(stage) + 1:02d}-{stage}"

    def model(self, stage: str | None) -> Path:
        """The model folder of a stage, or of what the chain starts from."""
        return self.folder(stage) / "model" if stage else Path(self.recipe.start or "")

    def origin(self, stage: str) -> Path:
        """The model folder that a stage starts from."""
        return self.model(self.recipe.before(stage))

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder("tokenizer"))

    def progress(self, stage: str, total: int | None, unit: str) -> Progress:
        return Progress(stage, total, unit, enabled=not self.quiet)


def loader(run: Run, stage: Any, samples: Samples, row: int, plan: Sequence[int] = ()) -> Loader:
    """The samples in packed rows of `row` tokens, this rank's share of each step of stage.tokens_per_step tokens."""
    rows = max(stage.tokens_per_step // row, 1)
    micro = min(max(stage.micro_tokens // row, 1), -(-rows // run.ranks.size))
    return Loader(samples, row, rows, micro, run.tokenizer().pad, run.recipe.seed, plan, run.ranks.rank, run.ranks.size)


def train(
    run: Run, name: str, model: Model, source: Any, steps: int, first: Rows | None = None, policy: Policy | None = None,
    preference: Preference | None = None, watch: Watch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the stage's model on a source's batches. policy: how sampled tokens teach; preference: how pairs of answers do; watch: who
    judges the steps."""
    stage: Stage = getattr(run.recipe, name)
    rule = Loss(mtp=stage.mtp if model.config.num_nextn_predict_layers else 0.0, balance=stage.sequence_balance, z=stage.z_loss)
    if policy:
        rule = replace(rule, mtp_apart=True, policy=policy)
    if preference:
        rule = replace(rule, preference=preference)
    ranks = run.ranks if kind(name) in TOGETHER else ALONE
    trainer = Trainer(model, stage, rule, run.folder(name), name, run.dtype, ranks, first)
    if ranks.leader:
        trainer.sinks = Sinks(run.recipe.sinks, run.out, name)
    if policy:
        trainer.lag = 0  # a rollout waits for the new weights anyway, and times are only true so
    trainer.watch = watch
    trainer.peak = 1e9 * peak(run.device, measured=not run.quiet).get(str(run.dtype).removeprefix("torch."), 0.0) * ranks.size
    if run.attempt:
        run.attempt.follow(lambda: (trainer.spent, trainer.totals))
    totals = trainer.run(source, steps, quiet=run.quiet)
    if ranks.leader:
        run.tokenizer().save(run.folder(name) / "model")
    return {"steps": steps, "tokens": totals.tokens}


def record(run: Run, name: str) -> None:
    """lineage.json of a finished stage."""
    stages = run.recipe.stages
    parents: list[Path | str] = [run.folder(stages[stages.index(name) - 1])] if name != stages[0] else []
    if name in run.recipe.chain:
        parents = [run.folder(p) for p in needed(run.recipe, name)]
    if run.recipe.start and (name == "tokenizer" or (name in (*run.recipe.models, *run.recipe.chain) and run.recipe.before(name) is None)):
        parents.append(run.recipe.start)
    teacher = getattr(getattr(run.recipe, name, None), "teacher", "")
    if teacher and teacher not in stages:
        parents.append(teacher)
    lineage(run.folder(name), parents=parents, seed=run.recipe.seed, cost=stage_cost(run.out, name),
            accelerator=None if run.device.type == "cpu" else str(run.device), dtype=str(run.dtype), stage=name)  # fmt: skip


def needed(recipe: Recipe, name: str) -> list[str]:
    """The earlier stages that a stage of the chain reads from, the one whose model it starts from first."""
    table = getattr(recipe, name)
    named = [getattr(table, key, "") for key in ("teacher", "reward")]
    asked = [recipe.before(name), *named, *getattr(table, "data", []), *getattr(table, "rewards", [])]
    return [stage for stage in dict.fromkeys(asked) if stage in recipe.stages] or ["tokenizer"]
