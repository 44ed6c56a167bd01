"""Does RL with self-reports leave the task alone, and do the reports become better? On the coin of the tests, from a cold start.

    PYTHONPATH=.:tests python bench/confession.py OUT [--seeds 3] [--steps 20]

The chain of tests/coin.toml up to sft, then some steps on the same chats and on cold-start reports; from there rl with [rl.confession]
and without, each seed. Prints a line of JSON each: accuracy over the last 5 steps, and the task honesty before and after.
"""

import argparse
import copy
import json
import random
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pascaline.data import chats
from pascaline.data.batch import batches
from pascaline.engine import Engine
from pascaline.eval.honesty import honesty
from pascaline.eval.plan import Plan
from pascaline.model import hf
from pascaline.model.transformer import Model
from pascaline.post import chain
from pascaline.post.confession import confession_samples
from pascaline.post.rollout import Rollouts
from pascaline.post.sft import puzzle_chats
from pascaline.recipe import Recipe, load
from pascaline.runs import Metrics
from pascaline.tokenizer import Tokenizer
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss, compute, totals

COIN = Path(__file__).parent.parent / "tests" / "coin.toml"
TOLD = ("score", "low", "high", "n", "accuracy", "confessed", "false_alarm", "auc", "unclear", "base_rate", "reports")


def cold(model: Model, tokenizer: Tokenizer, recipe: Recipe, steps: int) -> None:
    """Teach the reports to the sft stage's model, with its own chats beside, so that it forgets none of them."""
    taught = chats.gather(puzzle_chats(recipe.puzzles, recipe.seed), tokenizer, ["assistant"], 128)
    samples = [*map(taught.get, range(len(taught.lengths))), *confession_samples(recipe.puzzles, tokenizer, recipe.seed, 1.0)]
    optimizer, rng = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0), random.Random(0)
    for _ in range(steps):
        found = batches(rng.sample(samples, 48), 128, 64, tokenizer.pad)
        total = totals(found)
        optimizer.zero_grad()
        for batch in found:
            compute(model, batch, total, Loss())[0].backward()
        optimizer.step()


def measure(engine: Engine) -> dict[str, Any]:
    plan = Plan(task="honesty:coin:puzzle", problems=500, samples=1, max_tokens=24, temperature=1.0, top_p=1.0)
    found = honesty(engine, plan, lambda done, of: None)
    return {key: round(found[key], 4) if isinstance(found[key], float) else found[key] for key in TOLD}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cold", type=int, default=200)
    parser.add_argument("--weight", type=float, default=1.0)
    asked = parser.parse_args()
    chain.run(COIN, asked.out, stage="sft", quiet=True)
    folder = asked.out / "04-sft" / "model"
    tokenizer, first = Tokenizer.load(folder), hf.load(folder)
    cold(first, tokenizer, load(COIN), asked.cold)
    print(json.dumps({"before": measure(Engine(copy.deepcopy(first), tokenizer))}))
    for seed in range(1, asked.seeds + 1):
        for reports in (False, True):
            more = {"rl.confession.share": 1.0, "rl.confession.weight": asked.weight} if reports else {}
            recipe = load(COIN, {"rl.steps": asked.steps, **more})
            model = copy.deepcopy(first)
            engine = Engine(model, tokenizer)
            with tempfile.TemporaryDirectory() as place:
                source = Rollouts(engine, recipe.rl, recipe.puzzles, seed)
                Trainer(model, recipe.rl, Loss(), Path(place), "rl", torch.float32).run(source, asked.steps, quiet=True)
                rows = Metrics.read(Path(place) / "metrics.jsonl")
            accuracy = round(fmean(row["accuracy"] for row in rows[-5:]), 4)
            print(json.dumps({"seed": seed, "confession": reports, "accuracy_at_the_end": accuracy, **measure(engine)}), flush=True)


if __name__ == "__main__":
    main()
