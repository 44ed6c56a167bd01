"""From samples to batches: documents packed into rows without cutting or mixing them.

A batch carries tokens, positions, document ids and per-token weight streams; whoever fills the streams decides what is learnt
(`ce` cross-entropy, `rl` policy gradient, `kl` distance to a reference, `soft` a teacher's distribution). A stream's value at t belongs to
the token at t, which is predicted from what stands before it; so the first token of a document never carries weight. What has more
dimensions than the tokens is no weight but a record of them (`routes`, the experts of each layer; `top_ids`, a teacher's tokens), and
keeps its type.

Shapes: B rows, T tokens a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, device

Streams = dict[str, np.ndarray]


@dataclass(frozen=True)
class Sample:
    """One document: tokens [t] and streams, each [t] float32, or a record [t, ...] of any type. begins: where each of its documents begins,
    of several that must stand side by side in one row (two answers of which one is better)."""

    tokens: np.ndarray
    streams: Streams
    begins: tuple[int, ...] = (0,)


@dataclass
class Batch:
    tokens: "Tensor"  # [B, T] int64
    positions: "Tensor"  # [B, T] int64, from 0 in each document
    document_ids: "Tensor"  # [B, T] int64, -1 for padding
    streams: dict[str, "Tensor"] = field(default_factory=dict)  # each [B, T] float32; a record [B, T, ...]

    def weight(self, name: str) -> "Tensor":
        """The stream's weights of the targets, the tokens but each row's first: [B * (T - 1)], zeros where the batch has none."""
        stream = self.streams[name] if name in self.streams else self.tokens.new_zeros(self.tokens.shape).float()
        return stream[:, 1:].flatten()

    def to(self, device: "device") -> "Batch":
        streams = {name: moved(stream, device) for name, stream in self.streams.items()}
        return Batch(moved(self.tokens, device), moved(self.positions, device), moved(self.document_ids, device), streams)


def moved(tensor: "Tensor", device: "device") -> "Tensor":
    """`tensor` on the device, which need not have done what it was told before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pack(lengths: Sequence[int] | np.ndarray, row: int) -> list[list[int]]:
    """Rows of document indices, each row at most `row` tokens: best fit, longest first. Every length must be <= row.

    Open rows are kept by the space they have left; the set of those spaces is one big integer, whose lowest set bit at or
    above a length is the best fit.
    """
    by_space: dict[int, list[int]] = {}
    spaces = 0
    rows: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[i])
        fitting = spaces >> length
        if fitting:
            space = length + ((fitting & -fitting).bit_length() - 1)
            r = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, r = row, len(rows)
            rows.append([])
        rows[r].append(i)
        by_space.setdefault(space - length, []).append(r)
        spaces |= 1 << (space - length)
    return rows


def collate(rows: Sequence[Sequence[Sample]], row: int, pad: int) -> Batch:
    """Lay samples side by side, one list of samples a row, padded to `row` tokens."""
    import torch

    shape = (len(rows), row)
    tokens = np.full(shape, pad, np.int64)
    positions = np.zeros(shape, np.int64)
    documents = np.full(shape, -1, np.int64)
    kinds = {name: stream for samples in rows for s in samples for name, stream in s.streams.items()}
    streams = {name: _room(shape, kinds[name]) for name in sorted(kinds)}
    for b, samples in enumerate(rows):
        at = d = 0
        for sample in samples:
            span = slice(at, at := at + len(sample.tokens))
            tokens[b, span] = sample.tokens
            for name, stream in sample.streams.items():
                streams[name][b, span] = stream
            for begin, end in pairwise((*sample.begins, len(sample.tokens))):
                own = slice(span.start + begin, span.start + end)
                positions[b, own] = np.arange(end - begin)
                documents[b, own] = d
                d += 1
                for name, stream in sample.streams.items():
                    if stream.ndim == 1:
                        streams[name][b, own.start] = 0.0  # nothing stands before it in its document
    numpy_streams = {name: torch.from_numpy(s) for name, s in streams.items()}
    return Batch(torch.from_numpy(tokens), torch.from_numpy(positions), torch.from_numpy(documents), numpy_streams)


def _room(shape: tuple[int, int], stream: np.ndarray) -> np.ndarray:
    return np.zeros((*shape, *stream.shape[1:]), np.float32 if stream.ndim == 1 else stream.dtype)


def batches(samples: Sequence[Sample], row: int, rows_per_batch: int, pad: int) -> list[Batch]:
    """Pack samples and cut the rows into micro-batches of at most `rows_per_batch` rows."""
    rows = [[samples[i] for i in r] for r in pack([len(s.tokens) for s in samples], row)]
    return [collate(rows[i : i + rows_per_batch], row, pad) for i in range(0, len(rows), rows_per_batch)]
