"""What each stage of the chain does: read the folders before it, write its own."""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pascaline import tokenizer as tokenizers
from pascaline.data.build import cleaned
from pascaline.data.card import corpus_card, token_card
from pascaline.data.loader import CorpusSamples
from pascaline.data.mixture import Share, missing
from pascaline.data.puzzles import plain
from pascaline.data.puzzles.families import Family
from pascaline.data.shards import Corpus, ShardWriter
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.post import extension
from pascaline.post.check import model_config
from pascaline.post.stage import Run, loader, train
from pascaline.recipe import Recipe
from pascaline.runs import atomic_path, write_atomic
from pascaline.stopping import Interrupt
from pascaline.tables import Pretrain
from pascaline.tokenizer import Tokenizer
from pascaline.train.initial import drawn, stored
from pascaline.train.schedule import ramp

TOKENIZER_BYTES = 8_000_000  # of text to learn merges from; more changes little
BATCH = 1000  # documents encoded at once


def corpus(run: Run, name: str = "corpus") -> dict[str, Any]:
    """documents.jsonl (text, source, id), excluded.jsonl (what was left out and why) and card.md."""
    recipe, folder = run.recipe, run.folder(name)
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
            yield plain.text(problem.prompt, trace.thought, trace.answer), f"puzzle:{name}", problem.key


def read_documents(run: Run) -> Iterator[dict[str, str]]:
    with open(run.folder("corpus") / "documents.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def tokenizer(run: Run, name: str = "tokenizer") -> dict[str, Any]:
    """tokenizer.json and its companions, and the corpus, if there is one, as token shards with their card.md."""
    folder, start = run.folder(name), run.recipe.start

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


def pretrain(run: Run, name: str) -> dict[str, Any]:
    """Next-token prediction on the packed corpus, from random weights, or from those of an earlier stage or of the folder that the chain
    starts from."""
    stage: Pretrain = getattr(run.recipe, name)
    if not stage.model and (run.recipe.before(name) or run.recipe.start):
        model, first = stored(run.origin(name), run.device, run.ranks)
    else:
        own = run.tokenizer()
        shape = model_config(run.recipe, own.vocab_size, stage.model, f"{name}.model")
        if run.recipe.start:  # a shape knows the special tokens of our own tokenizers only
            ids = {"bos_token_id": next(iter(own.prefix), None), "eos_token_id": own.end_of_turn, "pad_token_id": own.pad}
            shape = shape.model_copy(update=ids)
        model, first = drawn(shape, run.recipe.seed, run.device, run.ranks)
    row, shards = stage.sequence_length, Corpus(run.folder("tokenizer") / "shards")
    samples = CorpusSamples(shards, row, run.recipe.corpus.held_out)
    if run.recipe.extend and name == "pretrain":
        extension.held_out_texts(shards, run.recipe, model.config.max_position_embeddings)  # what it lacks is said before days of training
    rows = max(stage.tokens_per_step // row, 1)
    least = max(stage.ramp_from // row, 1) if stage.ramp_from else rows
    plan = ramp(stage.tokens, row, rows, least, int(stage.ramp_until * stage.tokens))
    return train(run, name, model, loader(run, stage, samples, row, plan), len(plan), first)


def extend(run: Run, name: str) -> dict[str, Any]:
    """A longer context: YaRN, and next-token prediction on long rows of the same corpus (DeepSeek-V3, arXiv 2412.19437 section 4.3).
    extension.json says what each of the two did."""
    stage, folder, base = run.recipe.extend, run.folder(name), run.origin(name)
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
    rows = loader(run, stage, CorpusSamples(shards, row, run.recipe.corpus.held_out, stage.shortest), row)
    summary = train(run, name, model.reposition_(new), rows, -(-stage.tokens // rows.step_tokens), first)
    if run.ranks.leader:
        check.measure("tuned", lambda: hf.load(folder / "model", run.dtype, run.device))
        check.finish(new.rope.factor)
    return summary
