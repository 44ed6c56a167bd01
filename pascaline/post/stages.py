"""What each stage of the chain does: read the folders before it, write its own."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pascaline import tokenizer as tokenizers
from pascaline.data.build import cleaned
from pascaline.data.card import corpus_card, token_card
from pascaline.data.loader import CorpusSamples, ListSamples, Loader, Samples
from pascaline.data.mixture import Share, missing
from pascaline.data.puzzles.families import Family
from pascaline.data.shards import Corpus, ShardWriter
from pascaline.device import peak
from pascaline.engine import Engine
from pascaline.errors import BadInput
from pascaline.ledger import Attempt, stage_cost
from pascaline.model import hf
from pascaline.model.transformer import Model
from pascaline.post import extension
from pascaline.post.check import model_config
from pascaline.post.reference import Reference
from pascaline.post.rollout import Rollouts
from pascaline.post.sft import puzzle_samples
from pascaline.progress import Progress
from pascaline.recipe import Extend, Pretrain, Recipe, Sft, Stage
from pascaline.runs import atomic_path, lineage, write_atomic
from pascaline.stopping import Interrupt
from pascaline.tokenizer import Tokenizer
from pascaline.train.initial import drawn, stored
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss
from pascaline.train.parallel import ALONE, Ranks, Rows
from pascaline.train.policy import Policy
from pascaline.train.schedule import ramp
from pascaline.train.sinks import Sinks

TOGETHER = ("pretrain", "extend", "sft")  # stages that all ranks work at; the leader does the others alone
TOKENIZER_BYTES = 8_000_000  # of text to learn merges from; more changes little
BATCH = 1000  # documents encoded at once


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

    def before(self, stage: str) -> Path:
        """The folder of the stage before."""
        return self.folder(self.recipe.stages[self.recipe.stages.index(stage) - 1])

    def origin(self, stage: str) -> Path:
        """The model folder that a training stage starts from."""
        before = self.recipe.stages[self.recipe.stages.index(stage) - 1]
        return Path(self.recipe.start or "") if before == "tokenizer" else self.folder(before) / "model"

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder("tokenizer"))

    def progress(self, stage: str, total: int | None, unit: str) -> Progress:
        return Progress(stage, total, unit, enabled=not self.quiet)


def corpus(run: Run) -> dict[str, Any]:
    """documents.jsonl (text, source, id), excluded.jsonl (what was left out and why) and card.md."""
    recipe, folder = run.recipe, run.folder("corpus")
    kept, size, left = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    shares: dict[str, Share] = {}
    seen, began = 0, time.monotonic()
    with (
        _cleared(folder / "scratch") as scratch,
        atomic_path(folder / "documents.jsonl") as temporary,
        open(temporary, "w", encoding="utf-8") as file,
        atomic_path(folder / "excluded.jsonl") as temporary_excluded,
        open(temporary_excluded, "w", encoding="utf-8") as excluded,
        run.progress("corpus", None, "document") as progress,
        Interrupt() as interrupt,
    ):

        def exclude(entry: dict[str, Any]) -> None:
            left[entry["source"], entry["filter"]] += 1
            excluded.write(json.dumps(entry) + "\n")

        def watch(read: int) -> None:
            nonlocal seen
            seen += read
            progress.update(seen, kept=kept.total(), docs_per_s=seen / max(time.monotonic() - began, 1e-9))
            if interrupt.requested:
                raise interrupt.stopped("stopped while gathering the corpus")

        for text, source, name in _texts(recipe, exclude, scratch, watch, shares):
            kept[source] += 1
            size[source] += len(text.encode())
            file.write(json.dumps({"text": text, "source": source, "id": name}) + "\n")
            watch(0)
        for line in missing(recipe.corpus, shares):
            progress.note(line)
    write_atomic(folder / "card.md", corpus_card(recipe.corpus, kept, size, left, shares))
    if not kept:
        why = ", ".join(f"{name} ({n})" for (_, name), n in left.most_common(3))
        raise BadInput(f"nothing is left of the corpus: {why}; {folder / 'excluded.jsonl'} has each case. Loosen corpus.filters.")
    return {"documents": kept.total(), "bytes": size.total()}


@contextmanager
def _cleared(folder: Path) -> Iterator[Path]:
    """A place for files that are needed for a while; it is gone afterwards, whatever happens."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _texts(
    recipe: Recipe,
    exclude: Callable[[dict[str, Any]], None],
    scratch: Path,
    watch: Callable[[int], None] = lambda read: None,
    shares: dict[str, Share] | None = None,
) -> Iterator[tuple[str, str, str]]:
    """(text, source, id) of the real text and of the puzzles' traces. Training problems only."""
    if recipe.corpus.sources and recipe.corpus.max_bytes:
        yield from cleaned(recipe.corpus, exclude, scratch, seed=recipe.seed, watch=watch, shares=shares)
    for name, table in recipe.puzzles.items():
        family = Family(name, table)
        for i, problem in enumerate(family.problems(table.traces, recipe.seed, held_out=False)):
            trace = family.trace(problem, random.Random(f"corpus {recipe.seed} {name} {i}"))
            watch(1)
            yield plain_text(problem.prompt, trace.thought, trace.answer), f"puzzle:{name}", problem.key


PLAIN_ANSWER = "Answer: "


def plain_text(prompt: str, thought: str, answer: str) -> str:
    """A trace as the base model reads it: no chat tokens, those come with sft."""
    return f"{prompt}\n{thought}\n{PLAIN_ANSWER}{answer}"


def read_documents(run: Run) -> Iterator[dict[str, str]]:
    with open(run.folder("corpus") / "documents.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def tokenizer(run: Run) -> dict[str, Any]:
    """tokenizer.json and its companions, and the corpus, if there is one, as token shards with their card.md."""
    folder, start = run.folder("tokenizer"), run.recipe.start

    def sample() -> Iterator[str]:
        # Spread over the whole file, whose sources stand one after the other.
        size = (run.folder("corpus") / "documents.jsonl").stat().st_size
        for i, document in enumerate(read_documents(run)):
            if i % max(size // TOKENIZER_BYTES, 1) == 0:
                yield document["text"]

    own = Tokenizer.load(start) if start else tokenizers.train(sample(), run.recipe.tokenizer.vocab_size)
    own.save(folder)
    tokens = _encode(run, own) if "corpus" in run.recipe.stages else 0
    return {"vocab_size": own.vocab_size, "tokens": tokens}


def _encode(run: Run, own: Tokenizer) -> int:
    """Write the corpus as token shards; how many tokens it has."""
    folder = run.folder("tokenizer")
    documents, tokens = Counter[str](), Counter[str]()
    with (
        ShardWriter(folder / "shards", own.vocab_size) as writer,
        run.progress("tokenizer", None, "document") as progress,
        Interrupt() as interrupt,
    ):
        batch: list[dict[str, str]] = []

        def flush() -> None:
            for document, ids in zip(batch, own.encode_batch([d["text"] for d in batch]), strict=True):
                writer.add([*own.prefix, *ids, own.end], document["source"])
                documents[document["source"]] += 1
                tokens[document["source"]] += len(ids) + len(own.prefix) + 1

        for document in read_documents(run):
            batch.append(document)
            if len(batch) == BATCH:
                flush()
                batch = []
                progress.update(documents.total(), tokens=writer.tokens)
                if interrupt.requested:
                    raise interrupt.stopped("stopped while encoding the corpus")
        flush()
        progress.update(documents.total(), tokens=writer.tokens)
    write_atomic(folder / "shards" / "card.md", token_card(run.recipe.corpus, documents, tokens))
    return tokens.total()


def pretrain(run: Run) -> dict[str, Any]:
    """Next-token prediction on the packed corpus, from random weights or from those of the folder that the chain starts from."""
    stage, own = run.recipe.pretrain, run.tokenizer()
    assert stage is not None
    if run.recipe.start:
        model, first = stored(run.recipe.start, run.device, run.ranks)
    else:
        model, first = drawn(model_config(run.recipe, own.vocab_size), run.recipe.seed, run.device, run.ranks)
    row, shards = stage.sequence_length, Corpus(run.folder("tokenizer") / "shards")
    samples = CorpusSamples(shards, row, run.recipe.corpus.held_out)
    if run.recipe.extend:
        extension.held_out_texts(shards, run.recipe, model.config.max_position_embeddings)  # what it lacks is said before days of training
    rows = max(stage.tokens_per_step // row, 1)
    least = max(stage.ramp_from // row, 1) if stage.ramp_from else rows
    plan = ramp(stage.tokens, row, rows, least, int(stage.ramp_until * stage.tokens))
    return _train(run, "pretrain", model, _loader(run, stage, samples, row, plan), len(plan), first)


def extend(run: Run) -> dict[str, Any]:
    """A longer context: YaRN, and next-token prediction on long rows of the same corpus (DeepSeek-V3, arXiv 2412.19437 section 4.3).
    extension.json says what each of the two did."""
    stage, folder, base = run.recipe.extend, run.folder("extend"), run.origin("extend")
    assert stage is not None
    model, first = stored(base, run.device, run.ranks)
    old, new = model.config, model.config.extended(stage.length)
    shards, row = Corpus(run.folder("tokenizer") / "shards"), stage.sequence_length or stage.length
    texts = extension.held_out_texts(shards, run.recipe, old.max_position_embeddings)
    check = extension.Check(folder, run.tokenizer(), texts, old.max_position_embeddings, stage, run.progress)
    roomy = old.model_copy(update={"max_position_embeddings": stage.length})
    if run.attempt:
        run.attempt.follow(lambda: (check.spent, check.stands))
    if run.ranks.leader:
        check.measure("plain", lambda: hf.load(base, run.dtype, run.device).reposition_(roomy))
        check.measure("yarn", lambda: hf.load(base, run.dtype, run.device).reposition_(new))
    run.ranks.tell()
    loader = _loader(run, stage, CorpusSamples(shards, row, run.recipe.corpus.held_out, stage.shortest), row)
    summary = _train(run, "extend", model.reposition_(new), loader, -(-stage.tokens // loader.step_tokens), first)
    if run.ranks.leader:
        check.measure("tuned", lambda: hf.load(folder / "model", run.dtype, run.device))
        check.finish(new.rope.factor)
    return summary


def sft(run: Run) -> dict[str, Any]:
    """A cold start on chats: thought, then answer; loss on the assistant's tokens."""
    stage = run.recipe.sft
    samples = ListSamples(puzzle_samples(run.recipe.puzzles, run.tokenizer(), run.recipe.seed))
    model, first = stored(run.origin("sft"), run.device, run.ranks)
    longest, room = int(samples.lengths.max()), model.config.max_position_embeddings
    if longest > room:
        raise BadInput(f"the longest chat has {longest} tokens, the model only {room} positions; raise model.max_position_embeddings.")
    loader = _loader(run, stage, samples, max(stage.sequence_length, longest))
    steps = max(round(stage.epochs * int(samples.lengths.sum()) / loader.step_tokens), 1)
    return _train(run, "sft", model, loader, steps, first)


def rl(run: Run) -> dict[str, Any]:
    """GRPO on puzzles, rollouts from the engine on the weights being trained; by one rank."""
    stage = run.recipe.rl
    start = run.folder("sft") / "model"
    model = hf.load(start, device=run.device)
    # The engine holds the same module object as the trainer, so it samples from the newest weights.
    reference = (
        Reference(model, start, run.folder("rl") / "reference", stage.reference_every, stage.save_every * (stage.keep_last + 1))
        if stage.kl
        else None
    )
    rollouts = Rollouts(Engine(model, run.tokenizer()), stage, run.recipe.puzzles, run.recipe.seed, reference)
    return _train(run, "rl", model, rollouts, stage.steps)


def _loader(run: Run, stage: Pretrain | Extend | Sft, samples: Samples, row: int, plan: Sequence[int] = ()) -> Loader:
    rows = max(stage.tokens_per_step // row, 1)
    micro = min(max(stage.micro_tokens // row, 1), -(-rows // run.ranks.size))
    return Loader(samples, row, rows, micro, run.tokenizer().pad, run.recipe.seed, plan, run.ranks.rank, run.ranks.size)


def _train(run: Run, name: str, model: Model, source: Any, steps: int, first: Rows | None = None) -> dict[str, Any]:
    stage: Stage = getattr(run.recipe, name)
    rule = Loss(mtp=stage.mtp if model.config.num_nextn_predict_layers else 0.0, balance=stage.sequence_balance, z=stage.z_loss)
    if name == "rl":
        rl = run.recipe.rl
        policy = Policy(rl.ratio, rl.surrogate, rl.clip_low, rl.clip_high, kl=rl.kl, unbiased=rl.unbiased)
        rule = replace(rule, mtp_apart=True, policy=policy)
    ranks = run.ranks if name in TOGETHER else ALONE
    trainer = Trainer(model, stage, rule, run.folder(name), name, run.dtype, ranks, first)
    if ranks.leader:
        trainer.sinks = Sinks(run.recipe.sinks, run.out, name)
    trainer.peak = 1e9 * peak(run.device, measured=not run.quiet).get(str(run.dtype).removeprefix("torch."), 0.0) * ranks.size
    if run.attempt:
        run.attempt.follow(lambda: (trainer.spent, trainer.totals))
    totals = trainer.run(source, steps, quiet=run.quiet)
    if ranks.leader:
        run.tokenizer().save(run.folder(name) / "model")
    return {"steps": steps, "tokens": totals.tokens}


def record(run: Run, name: str) -> None:
    """lineage.json of a finished stage."""
    parents: list[Path | str] = [] if name == run.recipe.stages[0] else [run.before(name)]
    if run.recipe.start and name in ("tokenizer", "pretrain", "extend", "sft") and run.origin(name) == Path(run.recipe.start):
        parents.append(run.recipe.start)
    lineage(run.folder(name), parents=parents, seed=run.recipe.seed, cost=stage_cost(run.out, name),
            accelerator=None if run.device.type == "cpu" else str(run.device), dtype=str(run.dtype), stage=name)  # fmt: skip
