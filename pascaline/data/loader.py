"""Batches by number: step i of a seed is always the same rows, so a resumed run needs no loader state but the step."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from pascaline.data.batch import Batch, Sample, collate, pack
from pascaline.data.shards import Corpus
from pascaline.errors import BadInput

WINDOW = 1 << 16  # documents packed together; bounds the memory and the time to the first batch


class Samples(Protocol):
    """Documents with known lengths that can be fetched one by one."""

    lengths: np.ndarray

    def get(self, i: int) -> Sample: ...

    def name(self, i: int) -> dict[str, Any]: ...


class CorpusSamples:
    """Every document of a corpus of at least `shortest` tokens, but the `held_out` share; one longer than a row is cut into pieces. All
    tokens but a piece's first carry `ce`."""

    def __init__(self, corpus: Corpus, row: int, held_out: float = 0.0, shortest: int = 0):
        ends = np.append(corpus.starts[1:], np.uint64(corpus.tokens)).astype(np.int64)
        starts = corpus.starts.astype(np.int64)
        left_out = corpus.held_out(held_out) | (ends - starts < shortest)
        pieces = np.where(left_out, 0, np.maximum(-(-(ends - starts) // row), 1))
        owner = np.repeat(np.arange(len(starts)), pieces)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.begin = starts[owner] + within * row
        self.lengths = np.minimum(ends[owner] - self.begin, row)
        self.owner = owner.astype(np.uint32)
        self.corpus = corpus

    def get(self, i: int) -> Sample:
        tokens = self.corpus.read(int(self.begin[i]), int(self.begin[i] + self.lengths[i]))
        weights = np.ones(len(tokens), np.float32)
        weights[0] = 0.0
        return Sample(tokens, {"ce": weights})

    def name(self, i: int) -> dict[str, Any]:
        """Source, number in the corpus, and the first of the piece's tokens in the document."""
        document = int(self.owner[i])
        offset = int(self.begin[i]) - int(self.corpus.starts[document])
        return {"source": self.corpus.sources[self.corpus.source_ids[document]], "document": document, "offset": offset}


class ListSamples:
    """Samples held in memory."""

    def __init__(self, samples: Sequence[Sample]):
        self.samples = samples
        self.lengths = np.array([len(s.tokens) for s in samples], np.int64)

    def get(self, i: int) -> Sample:
        return self.samples[i]

    def name(self, i: int) -> dict[str, Any]:
        return {"sample": i}


class Joined:
    """One kind of samples behind the other."""

    def __init__(self, *parts: Samples):
        self.parts = parts
        self.ends = list(accumulate(len(part.lengths) for part in parts))
        self.lengths = np.concatenate([part.lengths for part in parts])

    def _place(self, i: int) -> tuple[Samples, int]:
        at = bisect_right(self.ends, i)
        return self.parts[at], i - (self.ends[at - 1] if at else 0)

    def get(self, i: int) -> Sample:
        part, own = self._place(i)
        return part.get(own)

    def name(self, i: int) -> dict[str, Any]:
        part, own = self._place(i)
        return part.name(own)


class Loader:
    """Packed rows in an order fixed by the seed, epoch after epoch.

    row: tokens a row; rows: rows an optimizer step, after the steps of `ramp`, which have so many each; micro: rows a micro-batch.
    Row g of the run is the same whatever the number of ranks, the size of a micro-batch or of a step.

    rank, ranks: this process's share of each step's rows. All shares have as many rows and micro-batches, because the ranks compute
    together: where they do not come out even, some have an empty row.
    """

    def __init__(
        self,
        samples: Samples,
        row: int,
        rows: int,
        micro: int,
        pad: int,
        seed: int,
        ramp: Sequence[int] = (),
        rank: int = 0,
        ranks: int = 1,
    ):
        if not len(samples.lengths):
            raise BadInput("there is nothing to train on: the corpus holds no document.")
        if int(samples.lengths.max()) > row:
            raise BadInput(f"a sample of {int(samples.lengths.max())} tokens does not fit sequence_length {row}.")
        self.facts: dict[str, float] = {}
        self.samples, self.row, self.rows, self.micro, self.pad, self.seed = samples, row, rows, micro, pad, seed
        self.rank, self.ranks = rank, ranks
        self.step_tokens = rows * row
        self.starts = [0, *accumulate(ramp)]  # of the ramp's steps, and where it ends: row numbers
        self.epoch_rows = lru_cache(maxsize=2)(self._epoch_rows)
        self.epoch_size = cache(lambda epoch: len(self.epoch_rows(epoch)))  # a number an epoch: finding a row packs none again

    def _epoch_rows(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.samples.lengths))
        rows: list[np.ndarray] = []
        for start in range(0, len(order), WINDOW):
            window = order[start : start + WINDOW]
            rows += [window[r] for r in pack(self.samples.lengths[window], self.row)]
        return [rows[i] for i in random.permutation(len(rows))]

    def _row(self, index: int) -> list[int]:
        epoch = 0
        while index >= self.epoch_size(epoch):
            index -= self.epoch_size(epoch)
            epoch += 1
        return self.epoch_rows(epoch)[index].tolist()

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0)."""
        rows = [[self.samples.get(i) for i in row] for row in self._rows(step)]
        return [collate(rows[i : i + self.micro], self.row, self.pad) for i in range(0, len(rows), self.micro)]

    def documents(self, step: int) -> list[dict[tuple[int, int], dict[str, Any]]]:
        """What stands in each micro-batch of that step: (row, document id in it) -> its name."""
        rows = self._rows(step)
        return [
            {(b, d): self.samples.name(i) for b, row in enumerate(rows[at : at + self.micro]) for d, i in enumerate(self._each(row))}
            for at in range(0, len(rows), self.micro)
        ]

    def _each(self, row: list[int]) -> list[int]:
        """For each document of a row the sample that it is of."""
        return [i for i in row for _ in self.samples.get(i).begins]

    def _rows(self, step: int) -> list[list[int]]:
        """The samples of each of this rank's rows of a step."""
        start, count = self._start(step), self._start(step + 1) - self._start(step)
        first, stop = (start + rank * count // self.ranks for rank in (self.rank, self.rank + 1))
        return [self._row(g) if g < stop else [] for g in range(first, first - (-count // self.ranks))]

    def _start(self, step: int) -> int:
        past = step - (len(self.starts) - 1)
        return self.starts[step] if past < 0 else self.starts[-1] + past * self.rows
