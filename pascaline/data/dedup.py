"""What is in the corpus twice, nearly twice, or must not be in it at all: the evaluation texts.

Three generators that pass on what may stay and tell `excluded` the rest, each with the text because of which it goes.
`exact` reads once and holds some 40 bytes and the id of each document; `minhash` reads twice, and all that grows with the
corpus lies on disk, some 750 bytes a document; `decontaminate` reads once and holds the evaluation texts.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from hashlib import blake2b, shake_128
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pascaline.data.sources import Document, Excluded, exclude
from pascaline.errors import BadInput

BANDS, ROWS, GRAM = 14, 8, 5  # FineWeb's: 14 bands of 8 minima of word 5-grams
MEMORY, LEAST_MEMORY = 1 << 28, 1 << 16
REBUILD = 1 << 20  # documents that enter a grown table together
RECORD = np.dtype([("key", "<u8"), ("number", "<u8")])  # hash of a band, and the number of its document
PLACE = np.dtype([("offset", "<u8"), ("digest", "<u8")])  # where in names.jsonl a document stands, and the hash of all of it
BUCKETS = tuple(f"bucket-{number:03d}.bin" for number in range(128))  # of RECORDs; all open at once, and 256 files is a limit
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial that joins hashes: 2^64 / golden ratio, odd
MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))  # the finaliser of MurmurHash3

_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and han, written without spaces
_WORD = re.compile(f"[{_SINGLE}]|[^\\W_{_SINGLE}]+")
_ASCII = {code: " " for code in range(128) if not chr(code).isalnum()}


def normalised(text: str) -> str:
    """Unicode NFC, each run of white space one space, none at the ends. Case and punctuation are kept."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def words(text: str) -> list[str]:
    """The runs of letters and digits of the NFC text in lower case; each kana or han character is a word of its own.
    All else separates words, even the vowel signs of Indic scripts, so that words are short there."""
    if text.isascii():
        return text.lower().translate(_ASCII).split()
    return _WORD.findall(unicodedata.normalize("NFC", text).lower())


def exact(documents: Iterable[Document], excluded: Excluded, kept: Kept | None = None) -> Iterator[Document]:
    """Documents whose `normalised` text no earlier one has, of whatever source; the others go to `excluded` with filter
    "duplicate" and the {"id", "source"} of the first. Equal means an equal 128-bit BLAKE2b hash: the chance of one wrong
    pair among 10^9 documents is 1.5e-21. kept: shared by several calls, so that they are as one."""
    kept = kept or Kept()
    for document in documents:
        digest = blake2b(normalised(document.text).encode(errors="surrogatepass"), digest_size=16).digest()
        first = kept.first(digest, document)
        if first is None:
            yield document
        else:
            exclude(excluded, document.source, document.id, "duplicate", first, document.text)


class Kept:
    """16-byte hashes and names of the documents seen, in an open-addressing table with linear probing.

    16 bytes of hash, 8 to 16 of table, 12 of offset and source, and the id's own; a dict of bytes takes some 150 more.
    """

    def __init__(self) -> None:
        self.halves = array("Q")  # two for each document
        self.slots = np.zeros(1 << 10, np.uint32).data  # number of a document, from 1; 0: free
        self.names, self.ends, self.owners = bytearray(), array("Q", [0]), array("I")
        self.sources: dict[str, int] = {}

    def first(self, digest: bytes, document: Document) -> dict[str, str] | None:
        """The name of the document that came with this digest; None if there was none: now there is."""
        low, high = struct.unpack("<QQ", digest)
        slots, halves, mask = self.slots, self.halves, len(self.slots) - 1
        slot = low & mask
        while number := slots[slot]:
            if halves[2 * number - 2] == low and halves[2 * number - 1] == high:
                name = self.names[self.ends[number - 1] : self.ends[number]].decode()
                return {"id": name, "source": list(self.sources)[self.owners[number - 1]]}
            slot = (slot + 1) & mask
        halves.extend((low, high))
        self.names += document.id.encode(errors="replace")
        self.ends.append(len(self.names))
        self.owners.append(self.sources.setdefault(document.source, len(self.sources)))
        slots[slot] = len(self.owners)
        if 2 * len(self.owners) > len(slots):
            self._grow()
        return None

    def _grow(self) -> None:
        """A table of twice the size. Many documents try their next slot at once, and the last to write has it."""
        slots = np.zeros(2 * len(self.slots), np.uint32)
        mask = np.uint64(len(slots) - 1)
        for start in range(0, len(self.owners), REBUILD):
            slot = np.array(self.halves[2 * start : 2 * (start + REBUILD) : 2], np.uint64) & mask
            number = np.arange(start + 1, start + 1 + len(slot), dtype=np.uint32)
            while len(number):
                free = slots[slot] == 0
                slots[slot[free]] = number[free]
                homeless = slots[slot] != number
                slot, number = (slot[homeless] + np.uint64(1)) & mask, number[homeless]
        self.slots = slots.data


def minhash(
    documents: Callable[[], Iterable[Document]], folder: Path, excluded: Excluded, *, seed: int = 0, memory_bytes: int = MEMORY
) -> Iterator[Document]:
    """Documents that are the first of their cluster of near-duplicates, in order.

    Two documents are near-duplicates when all 8 minima of one of 14 bands agree: at similarity s (Jaccard, of the sets of
    5-grams of `words`) with probability 1 - (1 - s^8)^14 (Broder 1997; the setting of FineWeb); clusters are transitive.
    The others go to `excluded` with filter "near-duplicate" and {"id", "source", "similarity"}: the first of the cluster,
    and the share of the 112 minima that agree with it, low where only a chain of others leads there. A document of 1 to 4
    words is one n-gram, one without a word is never a near-duplicate.

    documents: called twice; raises BadInput when the second reading gives something else (and let only one tell `excluded`).
    folder: temporary files are made there, and removed at the end or on any error.
    memory_bytes: at least 64 KiB; less means more reading and the same result. A single document is held whole in any case.
    """
    folder, memory_bytes = Path(folder), max(memory_bytes, LEAST_MEMORY)
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".minhash-", dir=folder))
    try:
        count = _write(documents(), place, seed, memory_bytes)
        yield from _filtered(documents(), _clustered(count, place, memory_bytes), place, excluded)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write(documents: Iterable[Document], place: Path, seed: int, memory_bytes: int) -> int:
    """First reading, into signatures.bin (uint32 [documents, 112]), places.bin, names.jsonl and the buckets; the number of
    documents. What will be mapped has one row more, because an empty file cannot be mapped."""
    factors, shifts = permutations(seed)
    count = offset = 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(place / name, "wb")) for name in ("signatures.bin", "places.bin", "names.jsonl", *BUCKETS)]
        signatures, places, names, *buckets = files
        for batch, hashes, lengths in _batches(documents, memory_bytes, GRAM):
            wordy = np.flatnonzero(lengths)
            minima = signed(hashes, lengths[wordy], factors, shifts)
            rows = np.zeros((len(batch), BANDS * ROWS), "<u4")
            rows[wordy] = minima.T
            signatures.write(rows.tobytes())
            band = np.repeat(np.arange(BANDS, dtype=np.uint64)[:, None], len(wordy), 1)
            records = np.empty(band.shape, RECORD)
            records["key"] = _joined([band, *minima.reshape(BANDS, ROWS, len(wordy)).swapaxes(0, 1)])
            records["number"] = wordy + count
            _deal(records.ravel(), buckets)
            for document in batch:
                name = json.dumps([document.id.encode(errors="replace").decode(), document.source]).encode() + b"\n"
                names.write(name)
                places.write(struct.pack("<QQ", offset, _hash("\0".join(document))))
                offset += len(name)
            count += len(batch)
        signatures.write(bytes(4 * BANDS * ROWS))
        places.write(bytes(PLACE.itemsize))
    return count


def permutations(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b), uint64 [112] each: x -> (a x + b mod 2^64) >> 32 is a strongly universal hash of 32 bits onto 32
    (multiply-shift, Dietzfelbinger 1996), and exact in uint64, which wraps."""
    drawn = np.frombuffer(shake_128(f"minhash {seed}".encode()).digest(16 * BANDS * ROWS), "<u8").astype(np.uint64)
    return drawn[: BANDS * ROWS], drawn[BANDS * ROWS :]


def signed(hashes: np.ndarray, lengths: np.ndarray, factors: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """MinHash signatures, uint64 [112, D] below 2^32, of D documents that follow one another.
    hashes: uint64 [sum of lengths], of their words; lengths: int64 [D], each at least GRAM."""
    ends = np.cumsum(lengths)
    inside = np.ones(len(hashes), bool)
    for back in range(1, GRAM):
        inside[ends - back] = False  # no n-gram begins here: it would reach into the next document
    grams = _grams(hashes, GRAM)
    grams = grams[inside[: len(grams)]] >> np.uint64(32)
    starts = ends - lengths - (GRAM - 1) * np.arange(len(lengths))
    minima = np.empty((len(factors), len(lengths)), np.uint64)
    value = np.empty_like(grams)
    for row, factor, shift in zip(minima, factors, shifts, strict=True):
        np.multiply(grams, factor, out=value)
        value += shift
        row[:] = np.minimum.reduceat(value, starts) if len(starts) else 0
    return minima >> np.uint64(32)  # the least before the shift is the least after it


def _joined(columns: list[np.ndarray]) -> np.ndarray:
    """One uint64 for each sequence of uint64, in their order: a polynomial in BASE mod 2^64, then mixed."""
    total = columns[0].copy()
    for column in columns[1:]:
        total *= BASE
        total += column
    for factor in MIX:  # every bit comes to depend on every other
        total ^= total >> np.uint64(33)
        total *= factor
    return total ^ (total >> np.uint64(33))


def _grams(hashes: np.ndarray, size: int) -> np.ndarray:
    """uint64 [max(0, words - size + 1)]: hashes of the n-grams of `size` words, from those of the words."""
    count = max(0, len(hashes) - size + 1)
    return _joined([hashes[i : i + count] for i in range(size)])


def _hash(text: str) -> int:
    """64 bits of BLAKE2b, the same in every process, which Python's own hash is not."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


_word = lru_cache(1 << 15)(_hash)


def _hashes(found: list[str]) -> np.ndarray:
    return np.fromiter(map(_word, found), np.uint64, len(found))


def _batches(documents: Iterable[Document], memory_bytes: int, least: int) -> Iterator[tuple[list[Document], np.ndarray, np.ndarray]]:
    """(documents, hashes of the words of all, uint64, how many each has, int64), as many as fit in the processor's cache.
    A document of fewer than `least` words, but not of none, is filled up with empty words."""
    budget = min(memory_bytes // 2, 1 << 22)  # working on a document takes some 4 KiB, on a word 128 bytes
    batch, lengths, pending = list[Document](), list[int](), list[str]()
    for document in documents:
        found = words(document.text)
        if 0 < len(found) < least:
            found += [""] * (least - len(found))
        batch.append(document)
        lengths.append(len(found))
        pending += found
        if 128 * len(pending) + 4096 * len(batch) > budget:
            yield batch, _hashes(pending), np.array(lengths, np.int64)
            batch, lengths, pending = [], [], []
    if batch:
        yield batch, _hashes(pending), np.array(lengths, np.int64)


def _deal(records: np.ndarray, buckets: list) -> None:
    """Append each RECORD, in order, to the bucket that the top 7 bits of its key tell."""
    bucket = (records["key"] >> np.uint64(57)).astype(np.uint8)
    ends = np.cumsum(np.bincount(bucket, minlength=len(buckets)))
    for file, rows in zip(buckets, np.split(records[np.argsort(bucket, kind="stable")], ends[:-1]), strict=True):
        file.write(rows.tobytes())


def _clustered(count: int, place: Path, memory_bytes: int) -> np.ndarray:
    """int64 [documents], on disk: the lowest document number in each one's cluster."""
    step = memory_bytes // 64
    blocks = [(start, min(start + step, count + 1)) for start in range(0, count + 1, step)]
    with open(place / "parents.bin", "wb") as file:  # written, not mapped: a map of a hole in a full disk kills the process
        for start, stop in blocks:
            file.write(np.arange(start, stop, dtype=np.int64).tobytes())
    parents = np.asarray(np.memmap(place / "parents.bin", np.int64, "r+"))
    for name in BUCKETS:
        for first, other in _pairs(place / name, memory_bytes // 256):
            _join(parents, first, other)
        (place / name).unlink()
    for start, stop in blocks:
        _roots(parents, np.arange(start, stop))
    return parents[:count]


def _pairs(path: Path, capacity: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first, other), int64 each: other has a key that first had before it; some `capacity` RECORDs are in memory at most.

    The bucket is read in parts, and of each key only its first RECORD is carried on, so one key of half the corpus does no
    harm. When even its different keys might not fit, the bucket is read several times, each time for some of the keys.
    """
    if not path.stat().st_size:
        return
    records = np.asarray(np.memmap(path, RECORD, "r"))
    part = capacity // 2
    rounds = np.uint64(1 << ((len(records) - 1) // part).bit_length())
    for turn in range(int(rounds)):
        seen = np.empty(0, RECORD)
        for start in range(0, len(records), part):
            rows = records[start : start + part]
            rows = np.concatenate([seen, rows[rows["key"] % rounds == turn]])
            rows = rows[np.argsort(rows["key"], kind="stable")]
            fresh = np.ones(len(rows), bool)
            np.not_equal(rows["key"][1:], rows["key"][:-1], out=fresh[1:])
            seen = rows[fresh]
            yield seen["number"][np.cumsum(fresh) - 1][~fresh].astype(np.int64), rows["number"][~fresh].astype(np.int64)


def _join(parents: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Union of all pairs at once: each root takes a lower root it is paired with, until no pair has two roots."""
    while len(a):
        a, b = _roots(parents, a), _roots(parents, b)
        apart = a != b
        a, b = a[apart], b[apart]
        parents[np.maximum(a, b)] = np.minimum(a, b)


def _roots(parents: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node; afterwards the nodes point to it."""
    while True:
        above = parents[nodes]
        higher = parents[above]
        if np.array_equal(above, higher):
            return above
        parents[nodes] = higher


def _filtered(documents: Iterable[Document], kept: np.ndarray, place: Path, excluded: Excluded) -> Iterator[Document]:
    """Second reading: the documents that are `kept` for themselves."""
    changed = "the documents of the second reading are not those of the first"
    signatures = np.asarray(np.memmap(place / "signatures.bin", "<u4", "r")).reshape(-1, BANDS * ROWS)
    places = np.asarray(np.memmap(place / "places.bin", PLACE, "r"))
    number = -1
    with open(place / "names.jsonl", "rb") as names:
        for number, document in enumerate(documents):
            if number >= len(kept) or int(places["digest"][number]) != _hash("\0".join(document)):
                raise BadInput(f"{changed}: {document.id} of source '{document.source}' is new or has changed")
            first = int(kept[number])
            if first == number:
                yield document
                continue
            names.seek(int(places["offset"][first]))
            name, source = json.loads(names.readline())
            value = {"id": name, "source": source, "similarity": round(float(np.mean(signatures[number] == signatures[first])), 4)}
            exclude(excluded, document.source, document.id, "near-duplicate", value, document.text)
    if number + 1 < len(kept):
        raise BadInput(f"{changed}: {number + 1} instead of {len(kept)}")


class Hit(NamedTuple):
    """A text's first n-gram that an evaluation text has too, which one has it, and the share of its n-grams that the text has."""

    evaluation: str
    ngram: str
    share: float


class Contamination:
    """The n-grams of evaluation texts, of n `words`: lower case, no punctuation."""

    def __init__(self, texts: Iterable[tuple[str, str]], n: int = 13):
        """texts: (name, text) of each evaluation text; n: 13 is GPT-3's (Brown et al. 2020, appendix C), from 8 to 50.

        A text of fewer than n words is one n-gram, found where all its words stand in a row; one without a word is not looked
        for. Raises BadInput for another n, and when no text has a word.
        """
        if not 8 <= n <= 50:
            raise BadInput(f"n is {n}; n-grams for decontamination have 8 to 50 words")
        self.texts = [(name, found) for name, text in texts if (found := words(text))]
        if not self.texts:
            raise BadInput("no evaluation text to look for has a word in it")
        self.sizes = sorted({min(n, len(found)) for _, found in self.texts})
        grams = [_grams(_hashes(found), min(n, len(found))) for _, found in self.texts]
        owners = np.repeat(np.arange(len(grams)), [len(row) for row in grams])
        places = np.concatenate([np.arange(len(row)) for row in grams])
        self._keys, first = np.unique(np.concatenate(grams), return_index=True)
        self._owners, self._places = owners[first].tolist(), places[first].tolist()
        bits = max(10, (8 * len(self._keys)).bit_length())
        self._shift, self._marks = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        self._marks[self._keys >> self._shift] = True  # by top bits: few n-grams that are not in the table are looked up in it

    def hits(self, text: str) -> Hit | None:
        """The first match, the shortest of several at one place. No match rests on a hash alone: the words are compared."""
        found = words(text)
        for place, size, row in sorted(self._candidates(_hashes(found))):
            (name, theirs), at = self.texts[self._owners[row]], self._places[row]
            if theirs[at : at + size] == found[place : place + size]:
                ngrams = {tuple(theirs[i : i + size]) for i in range(len(theirs) - size + 1)}
                shared = ngrams & {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}
                return Hit(name, " ".join(found[place : place + size]), round(len(shared) / len(ngrams), 4))
        return None

    def _candidates(self, hashes: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(place, size, row): where words with these hashes may have an n-gram of the table, and which."""
        for size in self.sizes:
            grams = _grams(hashes, size)
            places = np.flatnonzero(self._marks[grams >> self._shift])
            rows = np.minimum(np.searchsorted(self._keys, grams[places]), len(self._keys) - 1)
            same = self._keys[rows] == grams[places]
            yield from ((place, size, row) for place, row in zip(places[same].tolist(), rows[same].tolist(), strict=True))


def decontaminate(documents: Iterable[Document], contamination: Contamination, excluded: Excluded) -> Iterator[Document]:
    """Documents without a hit; the others go to `excluded` with filter "contamination" and the fields of their Hit."""
    for batch, hashes, lengths in _batches(documents, MEMORY, 0):
        places = [place for place, _, _ in contamination._candidates(hashes)]
        suspects = set(np.searchsorted(np.cumsum(lengths), places, side="right").tolist())
        for number, document in enumerate(batch):
            hit = contamination.hits(document.text) if number in suspects else None
            if hit is None:
                yield document
            else:
                exclude(excluded, document.source, document.id, "contamination", hit._asdict(), document.text)
