"""Chats as training samples: the loss lies on the assistant's tokens only."""

import random
from typing import Any

import numpy as np

from pascaline.data.batch import Sample
from pascaline.data.loader import ListSamples
from pascaline.data.puzzles.families import Family
from pascaline.errors import BadInput
from pascaline.post.stage import Run, loader, train
from pascaline.tables import Puzzle, Sft
from pascaline.tokenizer import Tokenizer
from pascaline.train.initial import stored


def sft(run: Run, name: str) -> dict[str, Any]:
    """A cold start on chats: thought, then answer; loss on the assistant's tokens."""
    stage: Sft = getattr(run.recipe, name)
    samples = ListSamples(puzzle_samples(run.recipe.puzzles, run.tokenizer(), run.recipe.seed))
    model, first = stored(run.origin(name), run.device, run.ranks)
    longest, room = int(samples.lengths.max()), model.config.max_position_embeddings
    if longest > room:
        raise BadInput(f"the longest chat has {longest} tokens, the model only {room} positions; raise model.max_position_embeddings.")
    rows = loader(run, stage, samples, max(stage.sequence_length, longest))
    steps = max(round(stage.epochs * int(samples.lengths.sum()) / rows.step_tokens), 1)
    return train(run, name, model, rows, steps, first)


def chat_sample(prompt: list[int], completion: list[int]) -> Sample:
    """A prompt and its completion as one document; `ce` is 1 on the completion, its end token included, and 0 on the prompt."""
    weights = np.zeros(len(prompt) + len(completion), np.float32)
    weights[len(prompt) :] = 1.0
    return Sample(np.array(prompt + completion), {"ce": weights})


def puzzle_samples(tables: dict[str, Puzzle], tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """The recipe's cold-start chats: problems of the training side of the split, each with a written-out thought and its answer."""
    samples = []
    for name, table in tables.items():
        family = Family(name, table)
        # Another seed than the corpus: other draws of the same stream, still never a held-out problem.
        for i, problem in enumerate(family.problems(table.examples, seed + 1, held_out=False)):
            trace = family.trace(problem, random.Random(f"sft {seed} {name} {i}"))
            samples.append(chat_sample(*tokenizer.chat_ids(problem.prompt, trace.thought, trace.answer)))
    return samples
