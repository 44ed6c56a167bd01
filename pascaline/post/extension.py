"""What context extension did: loss by position on held-out text and needle recall, before and after."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pascaline.data.shards import Corpus
from pascaline.engine import Engine
from pascaline.errors import BadInput
from pascaline.eval import needle
from pascaline.eval.extension import summary_line
from pascaline.eval.perplexity import by_position
from pascaline.ledger import COST, Totals
from pascaline.model.transformer import Model
from pascaline.progress import Progress
from pascaline.recipe import Recipe
from pascaline.runs import read_json, write_json
from pascaline.stopping import Interrupt
from pascaline.tables import Extend
from pascaline.tokenizer import Tokenizer
from pascaline.train.loop import active_parameters

FILE = "extension.json"
CACHED = 1 << 17  # positions that the cache holds at a time while needles are looked for
MODELS = ("plain", "yarn", "tuned")  # RoPE as pre-trained; with YaRN switched on; after the training


def held_out_texts(corpus: Corpus, recipe: Recipe, positions: int) -> list[np.ndarray]:
    """Token ids of the held-out documents that reach furthest, extend.documents of them at most, equal ones once; the puzzles' traces
    only where there is no other text. BadInput if none is longer than the model's `positions`."""
    extend, share = recipe.extend, recipe.corpus.held_out
    assert extend is not None
    sizes = np.diff(np.append(corpus.starts, np.uint64(corpus.tokens)).astype(np.int64))
    puzzle = np.array([source.startswith("puzzle:") for source in corpus.sources])[corpus.source_ids]
    held_out = np.flatnonzero(corpus.held_out(share) & (puzzle.all() | ~puzzle) & (sizes > positions))
    if not len(held_out):
        raise BadInput(f"corpus.held_out = {share:g} holds out no text longer than the model's {positions} positions, so extend could "
                       "not be judged; raise it, or add longer texts.")  # fmt: skip
    distinct = {corpus.hashes[i]: i for i in held_out.tolist()}
    furthest = sorted(distinct.items(), key=lambda item: (-min(sizes[item[1]], extend.length), item[0]))
    return [corpus.document(i)[: extend.length] for _, i in furthest[: extend.documents]]


def ranges(positions: int, length: int) -> list[int]:
    """Ends of the ranges of positions: what the model had, twice that, ..., what it has now."""
    ends = [positions]
    while 2 * ends[-1] < length:
        ends.append(2 * ends[-1])
    return [*ends, length]


@dataclass
class Check:
    """Measures models; each one's numbers are kept in folder/parts, so that a stopped check goes on with the next. spent, stands: what
    that has cost in this attempt, and what there is of it."""

    folder: Path
    tokenizer: Tokenizer
    texts: list[np.ndarray]
    positions: int
    stage: Extend
    progress: Callable[[str, int | None, str], Progress]
    spent: Totals = field(default_factory=Totals)
    stands: Totals = field(default_factory=Totals)

    def part(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.json"

    def measure(self, name: str, load: Callable[[], Model]) -> None:
        if found := read_json(self.part(name)):
            self.stands.add(*(found[key] for key in COST))
            return
        began, ends = time.perf_counter(), ranges(self.positions, self.stage.length)
        engine, done = Engine(load(), self.tokenizer, max_rows=max(CACHED // self.stage.length, 1)), 0
        with (
            self.progress(f"extend {name}", len(self.texts) + len(ends) * bool(self.stage.needles), "part") as progress,
            Interrupt() as interrupt,
        ):

            def watch() -> None:
                nonlocal done
                progress.update(done := done + 1)
                if interrupt.requested:
                    raise interrupt.stopped(f"stopped while measuring the context of the model '{name}'")

            losses = by_position(engine.model, self.texts, ends, watch)
            needles = needle.recall(engine, ends, self.stage.needles, watch=watch) if self.stage.needles else []
            told = {"model": name, "loss": losses, "needles": needles}
            if missing := [str(end) for end in ends if self.stage.needles and end not in {row["length"] for row in needles}]:
                progress.note(f"no needle with a haystack fits into {', '.join(missing)} tokens")
            progress.note(summary_line(told))
        work = engine.stats.generated + engine.stats.prefilled + sum(map(len, self.texts))
        spent = (time.perf_counter() - began, work, 2.0 * active_parameters(engine.model) * work)
        write_json(self.part(name), {**told, **dict(zip(COST, spent, strict=True))})
        for totals in (self.spent, self.stands):
            totals.add(*spent)

    def finish(self, factor: float) -> None:
        """Write extension.json."""
        parts = [read_json(self.part(name)) or {} for name in MODELS]
        models = [{k: part[k] for k in ("model", "loss", "needles")} for part in parts]
        how = {"positions": self.positions, "length": self.stage.length, "factor": factor, "texts": len(self.texts)}
        write_json(self.folder / FILE, {**how, "needles": self.stage.needles, "needle_seed": needle.SEED, "models": models})
