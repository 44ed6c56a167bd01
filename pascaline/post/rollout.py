"""Rollouts: problems in, sampled answers and their advantages out, as batches for the trainer.

The engine's token ids and log-probabilities go to the loss as they are; nothing is decoded and encoded again on the way.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pascaline.data.batch import Batch, Sample, batches
from pascaline.data.puzzles import Problem, Verdict, plain
from pascaline.data.puzzles.families import Family
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.eval.questions import read_plain
from pascaline.post import environments, grpo, instruments
from pascaline.post.confession import confess
from pascaline.post.environments import episode
from pascaline.post.reference import Reference
from pascaline.post.reward import RewardModel
from pascaline.post.verifiers import judge, scores
from pascaline.tables import Puzzle, Rl
from pascaline.train.loop import active_parameters, forward_flops


@dataclass
class Groups:
    """G problems with n answers each, and what came of them; arrays are [G, n], flat [G]."""

    problems: list[Problem]
    outputs: list[list[Output]]
    verdicts: list[list[Verdict]]
    reward: np.ndarray
    advantage: np.ndarray
    known: np.ndarray
    flat: np.ndarray

    def put(self, fresh: "Groups") -> "Groups":
        """With those of `fresh` that have variance in the places of flat ones."""
        places = dict(zip(np.flatnonzero(self.flat).tolist(), np.flatnonzero(~fresh.flat).tolist(), strict=False))

        def mixed(own: Any, new: Any) -> Any:
            rows = [new[places[g]] if g in places else own[g] for g in range(len(self.flat))]
            return np.array(rows) if isinstance(own, np.ndarray) else rows

        return Groups(*(mixed(getattr(self, field.name), getattr(fresh, field.name)) for field in fields(self)))

    def samples(self, rl: Rl, prompt_ids: Callable[[str], list[int]]) -> list[Sample]:
        """The answers that teach: judged ones of groups with variance."""
        chosen = [(g, i) for g in np.flatnonzero(~self.flat) for i in np.flatnonzero(self.known[g])]
        lengths = np.array([len(self.outputs[g][i].token_ids) for g, i in chosen])
        weights, scale = grpo.averaged(lengths, rl.average, rl.max_tokens)
        prompts = {g: prompt_ids(self.problems[g].prompt) for g in np.flatnonzero(~self.flat)}  # once a group: a template is slow
        return [
            rl_sample(prompts[g], self.outputs[g][i], scale * float(self.advantage[g, i]), float(weight))
            for (g, i), weight in zip(chosen, weights, strict=True)
        ]


class Rollouts:
    """A Source for the training loop: step i samples with the weights of that moment and with a seed made from (seed, i)."""

    def __init__(self, engine: Engine, rl: Rl, tables: dict[str, Puzzle], seed: int, reference: Reference | None = None, name: str = "rl"):
        self.engine, self.rl, self.tables, self.seed, self.reference, self.name = engine, rl, tables, seed, reference, name
        self.clock = instruments.Clock()
        self.traces: instruments.Traces | None = None
        self.judges: dict[str, RewardModel] = {}  # earlier stages' reward models, by name
        self.facts: dict[str, Any] = {}
        self.flops_per_token = 2.0 * active_parameters(engine.model)
        self.read = 0.0  # FLOPs of a step's other models: of judges and reference

    def problems(self, step: int, refill: int = 0) -> list[Problem]:
        """This step's prompts, spread evenly over the puzzles; never a held-out one."""
        found = []
        for i, name in enumerate(self.rl.puzzles):
            share = self.rl.prompts // len(self.rl.puzzles) + (i < self.rl.prompts % len(self.rl.puzzles))
            seed = random.Random(self._seed(self.name, step, refill)).getrandbits(48)
            found += Family(name, self.tables[name]).problems(share, seed, held_out=False)
        return found

    def step(self, step: int) -> list[Batch]:
        before, self.read = self._tokens(), 0.0
        groups = self._sampled(step, 0, self.problems(step))
        told = instruments.facts(groups.outputs, groups.verdicts, groups.reward, groups.known, groups.flat)  # refills are chosen ones
        if self.traces:
            self.traces.keep(step, groups.problems, groups.outputs, groups.verdicts, groups.reward, groups.flat)
        assert self.engine.tokenizer is not None
        reports, more = self._confessed(step, groups)  # of the first draw too: chosen problems have another chance of being right
        if self.rl.refills:
            groups, told["refilled"] = self._refilled(step, groups)
        if self.rl.environment:
            told["turns"] = float(np.mean([getattr(o, "turns", 1) for group in groups.outputs for o in group]))
        samples = groups.samples(self.rl, self.prompt_ids) + reports
        self.engine.release()  # what is cached is the old weights', and the trainer needs the memory
        spent = self._tokens() - before
        row = max([self.rl.sequence_length, *(len(s.tokens) for s in samples)])
        found = batches(samples, row, max(self.rl.micro_tokens // row, 1), self.engine.tokenizer.pad)
        with self.clock("update"):
            if self.reference:
                found = self.reference.compared(found, step)
                self.read += forward_flops(self.reference.model, sum(len(s.tokens) for s in samples))
        flops = spent * self.flops_per_token + self.read
        self.facts = {**told, **more, "rollout_tokens": spent, "rollout_flops": flops, **self.clock.taken()}
        return found

    def _sampled(self, step: int, refill: int, problems: list[Problem]) -> Groups:
        seed = random.Random(self._seed("sample", step, refill)).getrandbits(48)
        sampling = Sampling(1.0, 1.0, self.rl.max_tokens, self.rl.samples, seed=seed)
        with self.clock("rollout"):
            acting = environments.get(self.rl.environment) if self.rl.environment else None
            outputs = (
                episode.play(self.engine, acting, problems, sampling)
                if acting
                else self.engine.generate([self.prompt_ids(p.prompt) if self.rl.plain else p.prompt for p in problems], sampling)
            )
            if self.rl.plain:
                outputs = [[read_plain(output) for output in group] for group in outputs]
        with self.clock("verify"):
            judged = episode.judge(problems, outputs) if acting else judge(problems, outputs)
        right = np.array([[v is Verdict.RIGHT for v in group] for group in judged.verdicts])
        known = np.array([[v is not Verdict.UNJUDGED for v in group] for group in judged.verdicts])
        cut = np.array([[o.finish_reason == "length" for o in group] for group in outputs])
        lengths = np.array([[len(o.token_ids) for o in group] for group in outputs])
        reward = grpo.rewards(judged.verdicts, cut, self.rl.wrong_reward) + grpo.overlong(lengths, self.rl.max_tokens, self.rl.overlong)
        for name, weight in self.rl.rewards.items():
            with self.clock("verify"):
                score, why = self._scores(name, problems, outputs)
            known &= ~np.isnan(score)
            reward += weight * np.nan_to_num(score)
            judged.trouble = judged.trouble or why
        self._refuse_blind(step, known, judged.trouble)
        advantage, flat = grpo.advantages(reward, right, known, self.rl.advantage)
        return Groups(problems, outputs, judged.verdicts, reward, advantage, known, flat)

    def _refilled(self, step: int, groups: Groups) -> tuple[Groups, int]:
        """Dynamic sampling (DAPO, arXiv 2503.14476 eq. 11), but bounded: groups without variance make room for new problems' groups, up to
        rl.refills times; and how many were put in. The samples of the last that are still flat teach nothing, as without it."""
        added = 0
        for refill in range(1, self.rl.refills + 1):
            missing = int(groups.flat.sum())
            if not missing:
                break
            drawn = random.Random(self._seed("refill", step, refill)).sample(self.problems(step, refill), missing)  # of any puzzle
            fresh = self._sampled(step, refill, drawn)
            groups = groups.put(fresh)
            added += missing - int(groups.flat.sum())
        return groups, added

    def _confessed(self, step: int, groups: Groups) -> tuple[list[Sample], dict[str, float]]:
        """What the model says of its own answers, if rl.confession asks for it."""
        if self.rl.confession is None:
            return [], {}
        seed = random.Random(self._seed("confession", step, 0)).getrandbits(48)
        return confess(self.engine, groups.problems, groups.outputs, groups.verdicts, self.rl.confession, seed)

    def _seed(self, what: str, step: int, refill: int) -> str:
        return f"{what} {self.seed} {step}" + f" {refill}" * bool(refill)

    def _tokens(self) -> int:
        return self.engine.stats.generated + self.engine.stats.prefilled

    def _scores(self, name: str, problems: list[Problem], outputs: list[list[Output]]) -> tuple[np.ndarray, str]:
        """What a verifier gives each answer [G, n], NaN where it could not judge it, and why it could not judge the first such."""
        if name in self.judges:
            return self._preferred(self.judges[name], problems, outputs), ""
        each = [problem for problem, group in zip(problems, outputs, strict=True) for _ in group]
        found, why = scores(name, each, [output for group in outputs for output in group])
        return np.array(found, np.float64).reshape(len(problems), -1), why

    def _preferred(self, judge: RewardModel, problems: list[Problem], outputs: list[list[Output]]) -> np.ndarray:
        """How likely each answer is better than its group's average, by a reward model [G, n]: its scores have no zero of their own."""
        ids = [episode.whole(self.prompt_ids(p.prompt), o) for p, group in zip(problems, outputs, strict=True) for o in group]
        self.read += forward_flops(judge.model, sum(map(len, ids)))
        score = judge.scores(ids).reshape(len(problems), -1).astype(np.float64)
        return np.asarray(1 / (1 + np.exp(score.mean(1, keepdims=True) - score)))

    def prompt_ids(self, problem: str) -> list[int]:
        """A problem as the policy is asked it: a chat, or plain text that a base model goes on from."""
        own = self.engine.tokenizer
        assert own is not None
        return plain.prompt_ids(own, problem) if self.rl.plain else own.prompt_ids(problem)

    def _refuse_blind(self, step: int, known: np.ndarray, trouble: str) -> None:
        """A verifier that breaks must not pass for a policy that fails (verl PR 5635, open-r1 420)."""
        share = 1 - known.mean()
        if share > self.rl.max_unjudged:
            raise BadInput(
                f"{self.name} step {step}: {share:.0%} of the answers could not be judged, more than {self.name}.max_unjudged = "
                f"{self.rl.max_unjudged:g} ({trouble}). Mend the verifier, or raise the limit; the same command "
                "goes on from the last checkpoint."
            )

    def documents(self, step: int) -> list[Any]:
        """Nothing to name: the problems of a step follow from its number."""
        return []


def rl_sample(prompt: list[int], output: Output, advantage: float, weight: float = 1.0) -> Sample:
    """One answer as a document: weight, advantage and behaviour log-probability on its sampled tokens, nothing on what was given."""
    segments = episode.transcript(prompt, output)
    said = np.concatenate([np.full(len(s.ids), s.logprobs is not None, np.float32) for s in segments])
    logprobs = [p for s in segments for p in (s.logprobs if s.logprobs is not None else [0.0] * len(s.ids))]
    streams = {"rl": said * np.float32(weight), "advantage": said * np.float32(advantage), "old_logprob": np.array(logprobs, np.float32)}
    return Sample(np.array([token for s in segments for token in s.ids]), streams | output.record)
