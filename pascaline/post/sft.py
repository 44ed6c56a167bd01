"""Supervised fine-tuning on chats: from files, from earlier stages, and the puzzles' own worked examples."""

import hashlib
import random
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from typing import Any

from pascaline.data import chats
from pascaline.data.chats import Chat, ChatSamples
from pascaline.data.loader import Joined, ListSamples, Loader
from pascaline.data.puzzles.families import Family
from pascaline.errors import BadInput
from pascaline.post.confession import confession_samples
from pascaline.post.environments import worked
from pascaline.post.stage import Run, loader, train
from pascaline.runs import read_json, write_json
from pascaline.stopping import Interrupt
from pascaline.tables import Puzzle, Sft
from pascaline.train.initial import stored

FILE = "data.json"


def sft(run: Run, name: str) -> dict[str, Any]:
    """Learn what the stage's roles say. data.json tells how many chats there were, and names those that were left out."""
    stage: Sft = getattr(run.recipe, name)
    model, first = stored(run.origin(name), run.device, run.ranks)
    longest = min(stage.sequence_length, model.config.max_position_embeddings)
    samples = _gather(run, name, longest)
    facts = _facts(samples, stage, longest)
    if len({told["digest"] for told in run.ranks.gather(facts)}) > 1:
        raise BadInput(f"{name}: the ranks do not read the same chats; the files of {name}.data must be equal on all machines.")
    run.ranks.tell(_record(run, name, facts) if run.ranks.leader else None)
    tables = run.recipe.taught(name)
    reports = confession_samples(tables, run.tokenizer(), run.recipe.seed, stage.confessions) if stage.confessions else []
    fitting = [sample for sample in reports if len(sample.tokens) <= longest]
    rows = loader(run, stage, Joined(samples, ListSamples(fitting)), stage.sequence_length)
    return train(run, name, model, rows, steps(stage, rows), first)


def steps(stage: Sft, rows: Loader) -> int:
    """Optimizer steps of the stage; a whole epoch ends with no chat unread, whatever the padding."""
    if stage.tokens:
        return -(-stage.tokens // rows.step_tokens)
    whole, part = int(stage.epochs), stage.epochs % 1
    count = sum(map(rows.epoch_size, range(whole))) + (part * rows.epoch_size(whole) if part else 0)
    return max(ceil(count / rows.rows), 1)


def puzzle_chats(tables: Mapping[str, Puzzle], seed: int, environment: str = "") -> Iterator[Chat]:
    """The recipe's cold-start chats: problems of the training side of the split, each with a written-out thought and its answer, or as it
    is worked in an environment."""
    for name, table in tables.items():
        family = Family(name, table)
        # Another seed than the corpus: other draws of the same stream, still never a held-out problem.
        problems = family.problems(table.examples, seed + 1, held_out=False)
        if environment:
            yield from worked.episodes(family, problems, environment, seed)
            continue
        for i, problem in enumerate(problems):
            trace = family.trace(problem, random.Random(f"sft {seed} {name} {i}"))
            said = {"role": "assistant", "reasoning_content": trace.thought, "content": trace.answer}
            yield Chat([{"role": "user", "content": problem.prompt}, said], f"puzzle:{name}:{i}")


def _chats(run: Run, name: str) -> Iterator[Chat]:
    stage: Sft = getattr(run.recipe, name)
    for source in stage.data:
        yield from chats.stream(run.folder(source) / "chats.jsonl" if source in run.recipe.stages else Path(source))
    if stage.examples:
        yield from puzzle_chats(run.recipe.taught(name), run.recipe.seed, run.recipe.environment(name))


def _gather(run: Run, name: str, longest: int) -> ChatSamples:
    stage: Sft = getattr(run.recipe, name)
    progress = run.progress(f"{name} data", None, "chat")
    progress.enabled = progress.enabled and bool(stage.data)  # examples alone take a moment
    with progress, Interrupt() as interrupt:

        def watch(count: int) -> None:
            progress.update(count)
            if interrupt.requested:
                raise interrupt.stopped(f"stopped while reading the chats of {name}")

        return chats.gather(_chats(run, name), run.tokenizer(), stage.roles, longest, watch)


def _facts(samples: ChatSamples, stage: Sft, longest: int) -> dict[str, Any]:
    """What data.json holds. learnt: tokens with loss; documents: a chat has several where the template takes thoughts back."""
    digest = hashlib.blake2b(samples.tokens.tobytes() + samples.learnt.tobytes() + samples.starts.tobytes(), digest_size=16).hexdigest()
    too_long = {chat.name: chat.tokens for chat in samples.left_out if chat.tokens}
    silent = [chat.name for chat in samples.left_out if not chat.tokens]
    facts: dict[str, Any] = {"chats": len(samples.names), "documents": len(samples.lengths), "tokens": len(samples.tokens)}
    facts |= {"learnt": int(samples.learnt.sum()), "roles": stage.roles, "longest": longest, "digest": digest}
    return facts | {"left_out": {"too_long": too_long, "nothing_to_learn": silent}}


def _record(run: Run, name: str, facts: dict[str, Any]) -> BadInput | None:
    """Write data.json and say what was left out; what cannot be trained on is given back."""
    path, where = run.folder(name) / FILE, f"{run.folder(name).name}/{FILE}"
    told, before = _told(facts, name), read_json(path) or facts
    if before["digest"] != facts["digest"] and (run.folder(name) / "state").exists():
        return BadInput(f"{name} was begun with other chats than its files hold now; put those back, or start over with --fresh.")
    write_json(path, facts)
    if not facts["chats"]:
        return BadInput(f"{name}: no chat is left to learn from: {told}; {where} names them." if told else f"{name}: there is no chat.")
    if told:
        some = sum(map(len, facts["left_out"].values()))
        run.progress(name, None, "").note(f"{some} of {facts['chats'] + some} chats are left out: {told}; {where} names them")
    return None


def _told(facts: dict[str, Any], name: str) -> str:
    """What was left out, in words; nothing if nothing was."""
    too_long, silent = facts["left_out"]["too_long"], facts["left_out"]["nothing_to_learn"]
    said = []
    if too_long:
        said.append(f"{len(too_long)} of more than {name}.sequence_length = {facts['longest']} tokens (the longest has "
                    f"{max(too_long.values())})")  # fmt: skip
    if silent:
        said.append(f"{len(silent)} without a token of {name}.roles = {', '.join(facts['roles'])}")
    return ", ".join(said)
