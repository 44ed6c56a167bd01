"""Rollouts: problems in, sampled answers and their advantages out, as batches for the trainer.

The engine's token ids and log-probabilities go to the loss as they are; nothing is decoded and encoded again on the way.
"""

import random
from typing import Any

import numpy as np

from pascaline.data.batch import Batch, Sample, batches
from pascaline.data.puzzles import Problem, Verdict
from pascaline.data.puzzles.families import Family
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.post import grpo
from pascaline.post.verifiers import judge, scores
from pascaline.recipe import Puzzle, Rl
from pascaline.train.loop import active_parameters


class Rollouts:
    """A Source for the training loop: step i samples with the weights of that moment and with a seed made from (seed, i)."""

    def __init__(self, engine: Engine, rl: Rl, tables: dict[str, Puzzle], seed: int):
        self.engine, self.rl, self.tables, self.seed = engine, rl, tables, seed
        self.facts: dict[str, Any] = {}
        self.flops_per_token = 2.0 * active_parameters(engine.model)

    def problems(self, step: int) -> list[Problem]:
        """This step's prompts, spread evenly over the puzzles; never a held-out one."""
        found = []
        for i, name in enumerate(self.rl.puzzles):
            share = self.rl.prompts // len(self.rl.puzzles) + (i < self.rl.prompts % len(self.rl.puzzles))
            seed = random.Random(f"rl {self.seed} {step}").getrandbits(48)
            found += Family(name, self.tables[name]).problems(share, seed, held_out=False)
        return found

    def step(self, step: int) -> list[Batch]:
        problems = self.problems(step)
        sampling = Sampling(1.0, 1.0, self.rl.max_tokens, self.rl.samples, seed=random.Random(f"sample {self.seed} {step}").getrandbits(48))
        before = self.engine.stats.generated + self.engine.stats.prefilled
        outputs = self.engine.generate([p.prompt for p in problems], sampling)
        self.engine.release()  # what is cached is the old weights', and the trainer needs the memory
        spent = self.engine.stats.generated + self.engine.stats.prefilled - before
        judged = judge(problems, outputs)
        right = np.array([[v is Verdict.RIGHT for v in group] for group in judged.verdicts])
        known = np.array([[v is not Verdict.UNJUDGED for v in group] for group in judged.verdicts])
        cut = np.array([[o.finish_reason == "length" for o in group] for group in outputs])
        reward = grpo.rewards(judged.verdicts, cut, self.rl.wrong_reward)
        for name, weight in self.rl.rewards.items():
            score, why = self._scores(name, problems, outputs)
            known &= ~np.isnan(score)
            reward += weight * np.nan_to_num(score)
            judged.trouble = judged.trouble or why
        self._refuse_blind(step, known, judged.trouble)
        advantage, flat = grpo.advantages(reward, right, known)
        self.facts = {**_facts(outputs, judged.verdicts), "reward": float(reward[known].mean()) if known.any() else 0.0,
                      "unjudged": float(1 - known.mean()), "flat_groups": int(flat.sum()),
                      "rollout_tokens": spent, "rollout_flops": spent * self.flops_per_token}  # fmt: skip
        assert self.engine.tokenizer is not None
        samples = [
            rl_sample(self.engine.tokenizer.prompt_ids(p.prompt), o, float(a))
            for p, group, row, told, skip in zip(problems, outputs, advantage, known, flat, strict=True)
            if not skip
            for o, a, is_known in zip(group, row, told, strict=True)
            if is_known
        ]
        row = max([self.rl.sequence_length, *(len(s.tokens) for s in samples)])
        return batches(samples, row, max(self.rl.micro_tokens // row, 1), self.engine.tokenizer.pad)

    def _scores(self, name: str, problems: list[Problem], outputs: list[list[Output]]) -> tuple[np.ndarray, str]:
        """What a verifier gives each answer [G, n], NaN where it could not judge it, and why it could not judge the first such."""
        each = [problem for problem, group in zip(problems, outputs, strict=True) for _ in group]
        found, why = scores(name, each, [output for group in outputs for output in group])
        return np.array(found, np.float64).reshape(len(problems), -1), why

    def _refuse_blind(self, step: int, known: np.ndarray, trouble: str) -> None:
        """A verifier that breaks must not pass for a policy that fails (verl PR 5635, open-r1 420)."""
        share = 1 - known.mean()
        if share > self.rl.max_unjudged:
            raise BadInput(
                f"rl step {step}: {share:.0%} of the answers could not be judged, more than rl.max_unjudged = {self.rl.max_unjudged:g} "
                f"({trouble}). Mend the verifier, or raise the limit; the same command goes on from the last checkpoint."
            )

    def documents(self, step: int) -> list[Any]:
        """Nothing to name: the problems of a step follow from its number."""
        return []


def rl_sample(prompt: list[int], output: Output, advantage: float) -> Sample:
    """One answer as a document: weight, advantage and behaviour log-probability on its sampled tokens, nothing on the prompt."""
    zeros = np.zeros(len(prompt), np.float32)
    ones = np.ones(len(output.token_ids), np.float32)
    streams = {
        "rl": np.concatenate((zeros, ones)),
        "advantage": np.concatenate((zeros, ones * advantage)),
        "old_logprob": np.concatenate((zeros, np.array(output.logprobs, np.float32))),
    }
    return Sample(np.array(prompt + output.token_ids), streams)


def _facts(outputs: list[list[Output]], verdicts: list[list[Verdict]]) -> dict[str, float]:
    """Shares over all answers of a step; a truncated answer counts as wrong but not as a false claim."""
    flat = [(o, v) for group, row in zip(outputs, verdicts, strict=True) for o, v in zip(group, row, strict=True)]
    cut = [o.finish_reason == "length" for o, _ in flat]
    return {
        "accuracy": float(np.mean([v is Verdict.RIGHT for _, v in flat])),
        "abstain": float(np.mean([v is Verdict.ABSTAIN for _, v in flat])),
        "truncated": float(np.mean(cut)),
        "false_claim": float(np.mean([v is Verdict.WRONG and not c for (_, v), c in zip(flat, cut, strict=True)])),
        "response_tokens": float(np.mean([len(o.token_ids) for o, _ in flat])),
    }
