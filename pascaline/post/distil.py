"""Distillation: a student learns what a teacher would have said, on the student's own answers or on written ones.

The two need one vocabulary, for they are compared token by token; size, family, and whether they have experts may differ.
"""

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pascaline.data import chats, logits
from pascaline.data.batch import Batch, Sample, batches, collate, pack
from pascaline.data.puzzles import Problem, Verdict
from pascaline.data.puzzles.families import Family
from pascaline.engine import Engine, Output, Sampling
from pascaline.errors import BadInput
from pascaline.ledger import COST, Totals
from pascaline.model import hf
from pascaline.model.transformer import Model
from pascaline.post import environments
from pascaline.post.check import check_shared
from pascaline.post.environments import episode
from pascaline.post.reference import Reference
from pascaline.post.rollout import rl_sample
from pascaline.post.sft import puzzle_chats
from pascaline.post.stage import Run, loader, train
from pascaline.runs import write_json
from pascaline.stopping import Interrupt
from pascaline.tables import Distil, Puzzle
from pascaline.tokenizer import Tokenizer
from pascaline.train.loop import active_parameters
from pascaline.train.losses import top_logprobs
from pascaline.train.parallel import ALONE
from pascaline.train.policy import Policy

PART = 256  # samples in a file of the teacher's


def distil(run: Run, name: str) -> dict[str, Any]:
    """Teach the student by one rank; distil.json says of whom it learnt."""
    stage: Distil = getattr(run.recipe, name)
    run = replace(run, ranks=ALONE)
    teacher = teacher_folder(run, stage)
    check_shared(run.tokenizer(), teacher, name)
    own, other = hf.read_config(run.origin(name)), hf.read_config(teacher)
    shapes = {"teacher": other, "student": own}
    write_json(run.folder(name) / "distil.json", {"method": stage.method, **{who: _shape(c) for who, c in shapes.items()}})
    if stage.method == "logits":
        return _by_logits(run, name, stage, teacher)
    if other.vocab_size < own.vocab_size:
        raise BadInput(f"{name}: the student's head has {own.vocab_size} rows and the teacher's only {other.vocab_size}, so some tokens "
                       f"would go unjudged; take {name}.method = 'logits', or a student with as few.")  # fmt: skip
    return _by_policy(run, name, stage, teacher)


def teacher_folder(run: Run, stage: Distil) -> Path:
    return run.model(stage.teacher) if stage.teacher in run.recipe.models else Path(stage.teacher)


def _shape(config: Any) -> dict[str, Any]:
    keys = ("model_type", "hidden_size", "num_hidden_layers", "n_routed_experts", "vocab_size")
    return {key: getattr(config, key) for key in keys}


# ---- on the student's own answers ------------------------------------------------------------------------------------


def _by_policy(run: Run, name: str, stage: Distil, teacher: Path) -> dict[str, Any]:
    model = hf.load(run.origin(name), device=run.device)
    # The engine holds the same module object as the trainer, so it samples from the newest weights.
    source = Taught(
        Engine(model, run.tokenizer()), stage, run.recipe.puzzles, run.recipe.seed, Reference(model, teacher, teacher, 0, 0), name
    )
    source.acting = run.recipe.environment(name)
    return train(run, name, model, source, stage.steps, policy=Policy())


class Taught:
    """A Source for the training loop: the student answers, and the teacher says of each token how probable it was to it.

    On-policy distillation (Lu and Thinking Machines 2025; GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543) with the reverse KL of each
    token by itself: advantage = -(log p_student - log p_teacher) of the token that was sampled, in the stream `rl`. Its mean gradient is
    that of KL(student || teacher) over the next token at the places where the student goes; what a token does to later ones is left out.
    Every answer teaches to its last token, right or wrong, finished or not: no verifier has a say, the accuracy is only told.
    """

    def __init__(self, engine: Engine, stage: Distil, tables: dict[str, Puzzle], seed: int, teacher: Reference, name: str = "distil"):
        self.engine, self.stage, self.tables, self.seed, self.teacher, self.name = engine, stage, tables, seed, teacher, name
        self.acting = ""  # the environment that the student answers in
        self.facts: dict[str, Any] = {}
        self.flops_per_token = 2.0 * active_parameters(engine.model)

    def problems(self, step: int) -> list[Problem]:
        """This step's prompts, spread evenly over the puzzles; never a held-out one."""
        found: list[Problem] = []
        names = self.stage.puzzles
        for i, name in enumerate(names):
            share = self.stage.prompts // len(names) + (i < self.stage.prompts % len(names))
            found += Family(name, self.tables[name]).problems(share, self._seed(self.name, step), held_out=False)
        return found

    def step(self, step: int) -> list[Batch]:
        stage, engine = self.stage, self.engine
        assert engine.tokenizer is not None
        before, problems = engine.stats.generated + engine.stats.prefilled, self.problems(step)
        sampling = Sampling(1.0, 1.0, stage.max_tokens, stage.samples, seed=self._seed("sample", step))
        if self.acting:
            outputs = episode.play(engine, environments.get(self.acting), problems, sampling)
        else:
            outputs = engine.generate([p.prompt for p in problems], sampling)
        prompts = [engine.tokenizer.prompt_ids(p.prompt) for p in problems]
        samples = [rl_sample(prompt, output, 0.0) for prompt, group in zip(prompts, outputs, strict=True) for output in group]
        engine.release()  # what is cached is the old weights', and the trainer needs the memory
        row = max([stage.sequence_length, *(len(s.tokens) for s in samples)])
        found = batches(samples, row, max(stage.micro_tokens // row, 1), engine.tokenizer.pad)
        found = [_advised(batch) for batch in self.teacher.compared(found, step)]
        self._check_room(max(len(s.tokens) for s in samples))
        spent = engine.stats.generated + engine.stats.prefilled - before
        read = 2.0 * active_parameters(self.teacher.model) * sum(len(s.tokens) for s in samples)
        called = {"calls": episode.calls(outputs)} if self.acting else {}
        self.facts = {**_facts(problems, outputs), **called, "reverse_kl": _reverse_kl(found), "rollout_tokens": spent,
                      "rollout_flops": spent * self.flops_per_token + read}  # fmt: skip
        return found

    def _check_room(self, longest: int) -> None:
        room = self.teacher.model.config.max_position_embeddings
        if longest > room:
            raise BadInput(
                f"{self.name}: an answer ends at token {longest}, and the teacher has {room} positions; lower {self.name}.max_tokens."
            )

    def _seed(self, what: str, step: int) -> int:
        return random.Random(f"{what} {self.seed} {step}").getrandbits(48)

    def documents(self, step: int) -> list[Any]:
        """Nothing to name: the problems of a step follow from its number."""
        return []


def _advised(batch: Batch) -> Batch:
    """The reference's log-probabilities as advantages: log p_teacher - log p_student of each sampled token, 0 on all others."""
    streams = {name: batch.streams[name] for name in ("rl", "old_logprob")}
    advantage = (batch.streams["ref_logprob"] - streams["old_logprob"]) * streams["rl"].ne(0)
    return replace(batch, streams={**streams, "advantage": advantage})


def _reverse_kl(found: list[Batch]) -> float:
    """Mean over the sampled tokens of log p_student - log p_teacher, in nats: an unbiased estimate, so a step's may be under 0."""
    weight = sum(float(batch.streams["rl"].double().sum()) for batch in found)
    return -sum(float(batch.streams["advantage"].double().sum()) for batch in found) / weight


def _facts(problems: list[Problem], outputs: list[list[Output]]) -> dict[str, float]:
    judged = [verdict for group in episode.judge(problems, outputs).verdicts for verdict in group]
    known = [verdict is Verdict.RIGHT for verdict in judged if verdict is not Verdict.UNJUDGED]
    flat = [output for group in outputs for output in group]
    return {
        "accuracy": float(np.mean(known)) if known else 0.0,
        "unjudged": 1 - len(known) / len(judged),
        "truncated": float(np.mean([output.finish_reason == "length" for output in flat])),
        "response_tokens": float(np.mean([len(output.token_ids) for output in flat])),
    }


# ---- on written answers ----------------------------------------------------------------------------------------------


def _by_logits(run: Run, name: str, stage: Distil, teacher: Path) -> dict[str, Any]:
    samples = logits.TopSamples(list(_stored(run, name, stage, teacher)))
    model = hf.load(run.origin(name), device=run.device)
    longest, room = int(samples.lengths.max()), model.config.max_position_embeddings
    if longest > room:
        raise BadInput(f"{name}: the longest chat has {longest} tokens, the student only {room} positions; raise its "
                       "max_position_embeddings.")  # fmt: skip
    rows = loader(run, stage, samples, max(stage.sequence_length, longest))
    steps = max(round(stage.epochs * int(samples.lengths.sum()) / rows.step_tokens), 1)
    return train(run, name, model, rows, steps)


def _stored(run: Run, name: str, stage: Distil, teacher: Path) -> Iterator[Path]:
    """The files of what the teacher finds most probable in the chats, PART of them in each; those that are there already stay."""
    samples, tokenizer = written(run, stage, name), run.tokenizer()
    parts = [samples[at : at + PART] for at in range(0, len(samples), PART)]
    spent, stands = Totals(), Totals()
    if run.attempt:
        run.attempt.follow(lambda: (spent, stands))
    model: Model | None = None
    with run.progress(name, len(parts), "part") as progress, Interrupt() as interrupt:
        for i, part in enumerate(parts):
            path = run.folder(name) / "teacher" / f"{i * PART:06d}-{i * PART + len(part):06d}.safetensors"
            if (facts := logits.facts(path)) is None:
                model = model or hf.load(teacher, run.dtype, run.device)
                began, tokens = time.perf_counter(), sum(len(s.tokens) for s in part)
                tops = most_probable(model, part, stage, tokenizer)
                facts = {"seconds": time.perf_counter() - began, "tokens": tokens, "flops": 2.0 * active_parameters(model) * tokens}
                logits.write(path, part, tops, tokenizer.vocab_size, facts)
                spent.add(*(facts[key] for key in COST))
            stands.add(*(facts[key] for key in COST))
            progress.update(i + 1, teacher=stage.teacher)
            if interrupt.requested:
                raise interrupt.stopped(f"stopped after part {i + 1} of {len(parts)} of what the teacher says")
            yield path


@torch.no_grad()
def most_probable(model: Model, samples: list[Sample], stage: Distil, tokenizer: Tokenizer) -> list[logits.Top]:
    """For each sample the teacher's `stage.top` most probable tokens, and their log-probabilities, at each of its taught places."""
    top = min(stage.top, tokenizer.vocab_size)
    longest = max(len(s.tokens) for s in samples)
    row = max(stage.sequence_length, longest)
    if longest > model.config.max_position_embeddings:
        raise BadInput(f"a chat of {longest} tokens does not fit the teacher's {model.config.max_position_embeddings} positions.")
    rows, micro = pack([len(s.tokens) for s in samples], row), max(stage.micro_tokens // row, 1)
    found: dict[int, logits.Top] = {}
    for at in range(0, len(rows), micro):
        own = rows[at : at + micro]
        batch = collate([[samples[i] for i in r] for r in own], row, tokenizer.pad)
        keep = batch.weight("ce").nonzero().squeeze(1).to(model.device)
        batch = batch.to(model.device)
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        # Ids that the tokenizer has not are padding of the head's rows, which the student need not have.
        told = top_logprobs(hidden[:, :-1].flatten(0, 1)[keep], model.head_weight, top, tokenizer.vocab_size)
        ids, logprobs = (t.cpu().numpy() for t in told)
        start = 0
        for i in (i for r in own for i in r):
            span = slice(start, start := start + len(logits.taught(samples[i])))
            found[i] = ids[span], logprobs[span]
    return [found[i] for i in range(len(samples))]


def written(run: Run, stage: Distil, name: str) -> list[Sample]:
    """The chats of stage.data, or the puzzles' own examples where it names none; no chat is cut or left out."""
    recipe, tokenizer = run.recipe, run.tokenizer()
    paths = [run.folder(entry) / "chats.jsonl" if entry in recipe.stages else Path(entry) for entry in stage.data]
    found = (
        (chat for path in paths for chat in chats.stream(path))
        if paths
        else puzzle_chats(recipe.puzzles, recipe.seed, recipe.environment(name))
    )
    samples = chats.gather(found, tokenizer, ["assistant"], sys.maxsize)
    return [samples.get(i) for i in range(len(samples.lengths))]
