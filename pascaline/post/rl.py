"""The stage `rl`: what samples, what judges, and how the policy learns from it."""

from typing import Any

import torch

from pascaline.engine import Engine
from pascaline.model import hf
from pascaline.post.alarms import Alarms
from pascaline.post.instruments import TRACES, Traces
from pascaline.post.minibatches import Minibatches
from pascaline.post.moment import Moment
from pascaline.post.reference import Reference
from pascaline.post.reward import RewardModel
from pascaline.post.rollout import Rollouts
from pascaline.post.stage import Run, train
from pascaline.tables import Rl
from pascaline.train.policy import Policy


def rl(run: Run, name: str) -> dict[str, Any]:
    """GRPO on puzzles, rollouts from the engine on the weights being trained; by one rank."""
    stage: Rl = getattr(run.recipe, name).model_copy(update={"environment": run.recipe.environment(name)})
    start = run.origin(name)
    model = hf.load(start, device=run.device)
    back = -(-stage.save_every * (stage.keep_last + 1) // (stage.minibatches * stage.epochs))  # in rollouts, as the reference counts
    reference = Reference(model, start, run.folder(name) / "reference", stage.reference_every, back) if stage.kl else None
    tokenizer = run.tokenizer()
    # The engine holds the same module object as the trainer, so it samples from the newest weights.
    engine = Engine(model, tokenizer, record_routes=stage.replay or stage.watch_routing)
    rollouts = Rollouts(engine, stage, run.recipe.puzzles, run.recipe.seed, reference, name)
    judges = [reward for reward in stage.rewards if reward in run.recipe.chain and run.recipe.judges(reward)]
    rollouts.judges = {judge: RewardModel.load(run.folder(judge), device=run.device) for judge in judges}
    rollouts.traces = Traces(run.folder(name) / TRACES, stage.steps)
    source = Minibatches(rollouts, stage, run.folder(name), run.recipe.seed, tokenizer.pad, name, Moment(model, stage))
    policy = Policy(stage.ratio, stage.surrogate, stage.clip_low, stage.clip_high, stage.kl, stage.unbiased, stage.stale, stage.replay)
    return train(run, name, model, source, stage.steps * source.each, policy=policy, watch=Alarms(name, stage, run.dtype == torch.float32))
