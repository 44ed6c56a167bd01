"""Sources by weight: how much there is of each in the corpus, whatever its cleaning leaves of it, and how often it is repeated.

First each source is read until its share is there, clean, on the disk; then the shares are dealt out evenly mixed, small
ones again and again as far as that is allowed. In memory are eight bytes a document.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from pascaline.data.dedup import minhash
from pascaline.data.sources import Document, Excluded
from pascaline.tables import Corpus


class Share(NamedTuple):
    """Bytes of one source: what its weight asks for, and what was found once all that must go was gone (at most that much)."""

    wanted: int
    found: int

    def given(self, max_repeats: float) -> int:
        """Bytes in the corpus, repeats included."""
        return min(self.wanted, int(self.found * max_repeats))


def wanted(corpus: Corpus) -> dict[str, float]:
    """Each source's share of a mixture, all of them 1 in sum; a source without a weight has the weight 1."""
    weights = {source: corpus.mixture.get(source, 1.0) for source in corpus.sources}
    largest = max(weights.values())  # so that the sum of enormous ones is finite
    total = sum(weight / largest for weight in weights.values())
    return {source: weight / largest / total for source, weight in weights.items()}


def missing(corpus: Corpus, shares: Mapping[str, Share]) -> list[str]:
    """A sentence for each source that does not fill its share."""
    return [
        f"'{source}' fills {share.given(corpus.max_repeats):,} of the {share.wanted:,} bytes that corpus.mixture asks for: cleaning leaves "
        f"{share.found:,}, and corpus.max_repeats = {corpus.max_repeats:g}; give it more text, a smaller weight or more repeats."
        for source, share in shares.items()
        if share.given(corpus.max_repeats) < share.wanted
    ]


def mixed(
    corpus: Corpus,
    streams: Mapping[str, Generator[Document, None, None]],
    scratch: Path,
    excluded: Excluded,
    *,
    seed: int,
    watch: Callable[[int], None],
    shares: dict[str, Share],
) -> Iterator[Document]:
    """Documents of all `streams`, the clean texts of each source, `corpus.max_bytes` of UTF-8 in sum by corpus.mixture's weights.

    A stream is read until its share is full; one that is too short is gone through up to max_repeats times, in the order of
    the source and then in orders drawn from the seed. Sources alternate so that any part of the corpus is mixed alike. The
    last document of a source may be cut. Near-copies are looked for here, and more is read in place of those that go.

    scratch: where the clean texts are kept meanwhile; shares: filled before the first document; watch: see `build.cleaned`.
    """
    quota = {source: int(share * corpus.max_bytes) for source, share in wanted(corpus).items()}
    with Spool(scratch / "mixture.jsonl", watch) as spool:
        parts = _gathered(spool, streams, quota, corpus.dedup == "minhash", excluded)
        shares.update({source: Share(quota[source], min(quota[source], part.size)) for source, part in parts.items()})
        limits = {source: share.given(corpus.max_repeats) for source, share in shares.items()}
        orders = {source: _turns(spool, part.places, f"mixture {seed} {source}") for source, part in parts.items()}
        yield from _dealt(orders, limits)


def _dealt(orders: Mapping[str, Iterator[Document]], limits: Mapping[str, int]) -> Iterator[Document]:
    """Documents of each source up to its limit, in bytes; next comes the source that has given the smallest part of its own."""
    given = {source: 0 for source, limit in limits.items() if limit}
    while given:
        source = min(given, key=lambda source: given[source] / limits[source])
        document = next(orders[source])
        data = document.text.encode()
        room = limits[source] - given[source]
        if len(data) > room:
            document = document._replace(text=data[:room].decode(errors="ignore"))  # only a cut character is ignored
        given[source] += len(data)
        if len(data) >= room:
            del given[source]
        if document.text:
            yield document


def _turns(spool: Spool, places: array[int], seed: str) -> Iterator[Document]:
    """The documents at `places`, over and over: first in order, then in another order each time."""
    for turn in count():
        order = places
        if turn:
            order = array("q", places)
            random.Random(f"{seed} {turn}").shuffle(order)
        yield from map(spool.load, order)


@dataclass
class Part:
    """One source's documents: where they are in the spool, and their bytes of UTF-8."""

    places: array[int] = field(default_factory=lambda: array("q"))
    size: int = 0

    def add(self, place: int, document: Document) -> None:
        self.places.append(place)
        self.size += len(document.text.encode())


def _gathered(
    spool: Spool, streams: Mapping[str, Generator[Document, None, None]], quota: Mapping[str, int], near: bool, excluded: Excluded
) -> dict[str, Part]:
    """Each source's share, if it has so much. How much must be read for it only shows once near-copies are gone: so twice as
    much is tried of those that have more, and twice as much again."""
    unread, target = dict(streams), dict(quota)
    parts = {source: Part() for source in streams}
    while True:
        for source, stream in streams.items():
            while source in unread and parts[source].size < target[source]:
                if (document := next(stream, None)) is None:
                    del unread[source]
                else:
                    parts[source].add(spool.add(document), document)
            if not near:
                stream.close()  # it will not be asked again
        if not near:
            return parts
        told = spool.path.with_name("near.jsonl")
        unique = _unique(spool, parts, told)
        if not (short := [source for source in unread if unique[source].size < quota[source]]):
            break
        target.update({source: 2 * target[source] for source in short})
    with open(told, encoding="utf-8") as file:
        for line in file:
            excluded(json.loads(line))
    told.unlink()
    return unique


def _unique(spool: Spool, parts: Mapping[str, Part], told: Path) -> dict[str, Part]:
    """The parts without near-copies; what is excluded is written to `told`, for it may not be the last word."""
    unique = {source: Part() for source in parts}
    with open(told, "w", encoding="utf-8") as file:
        for document in minhash(spool.read, spool.path.parent, lambda entry: print(json.dumps(entry), file=file)):
            unique[document.source].add(spool.place, document)  # it is the one read last
    return unique


class Spool:
    """Documents in a file, each found again by its place; the file is gone after the `with`."""

    def __init__(self, path: Path, watch: Callable[[int], None] = lambda read: None) -> None:
        """watch: called with 0 for each document read back."""
        self.path, self.watch = path, watch
        self.place = self.size = 0

    def add(self, document: Document) -> int:
        """Its place. To be called before any `load`."""
        place = self.size
        self.size += self.file.write(json.dumps(document).encode() + b"\n")
        return place

    def load(self, place: int) -> Document:
        self.watch(0)
        self.file.seek(place)
        return Document(*json.loads(self.file.readline()))

    def read(self) -> Iterator[Document]:
        """All, in the order in which they came; `place` is that of the last one."""
        self.file.flush()
        with open(self.path, "rb") as file:
            place = 0
            for line in file:
                self.watch(0)
                self.place, place = place, place + len(line)
                yield Document(*json.loads(line))

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "w+b")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)
