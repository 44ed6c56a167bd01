"""Tokens on disk: `shard-*.bin`, memory-mapped, and `index.json`, which says where each document starts.

All documents stand one after the other in one long row of tokens, cut into shards of equal size; a document may cross
from one shard into the next. The index is written last, so a folder without it is not a corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pascaline.errors import BadInput
from pascaline.runs import TEMPORARY, sync_folder, write_atomic

FORMAT = 1
INDEX = "index.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class ShardWriter:
    """Writes a corpus into `folder`, under temporary names until `close`. As a context manager it closes itself, and
    leaves nothing behind when the block fails."""

    def __init__(self, folder: str | os.PathLike[str], vocab_size: int, max_tokens_per_shard: int = 2**26):
        """vocab_size decides the type on disk: uint16 up to 65536, else uint32 (shards of 128 or 256 MiB)."""
        self.folder, self.vocab_size, self.limit = Path(folder), vocab_size, max_tokens_per_shard
        self.dtype_name = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.dtype = DTYPES[self.dtype_name]
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(f".shard-*{TEMPORARY}"):  # of a run that was killed
            left_over.unlink()
        self.tokens = 0
        self.offsets, self.owners, self.hashes = array("Q"), array("L"), list[str]()
        self.sources: dict[str, int] = {}
        self.shards: list[dict[str, Any]] = []
        self._temporaries: list[Path] = []
        self._file: Any = None

    def add(self, ids: Sequence[int] | np.ndarray, source: str) -> None:
        """Append one document. Raises BadInput for no tokens or an id outside the vocabulary, OSError (a full disk) with
        nothing left behind; after that the writer is of no more use."""
        wide = np.asarray(ids)
        if wide.ndim != 1 or not wide.size or wide.dtype.kind not in "iu":
            raise BadInput(f"document {len(self.offsets)} of source '{source}' must be a row of at least one token id")
        least, most = int(wide.min()), int(wide.max())
        if least < 0 or most >= self.vocab_size:
            raise BadInput(
                f"document {len(self.offsets)} of source '{source}' holds token id {least if least < 0 else most}, "
                f"outside the vocabulary of {self.vocab_size}"
            )
        row = wide.astype(self.dtype)
        self.offsets.append(self.tokens)
        self.owners.append(self.sources.setdefault(source, len(self.sources)))
        self.hashes.append(hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest())
        self.tokens += len(row)
        try:
            self._write(row)
        except BaseException:
            self.abort()
            raise

    def _write(self, row: np.ndarray) -> None:
        while len(row):
            if self._file is None:
                self._open()
            shard = self.shards[-1]
            part, row = row[: self.limit - shard["tokens"]], row[self.limit - shard["tokens"] :]
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            shard["tokens"] += len(part)
            if shard["tokens"] == self.limit:
                self._finish()

    def close(self) -> None:
        """Force everything to the disk, give the shards their names, and write the index. Replaces an older corpus.

        Raises BadInput when no document was added, OSError (a full disk) with nothing left behind.
        """
        try:
            if not self.tokens:
                raise BadInput(f"the corpus for {self.folder} is empty: no document was added")
            if self._file is not None:
                self._finish()
        except BaseException:
            self.abort()
            raise
        (self.folder / INDEX).unlink(missing_ok=True)  # from here to the new index there is no corpus, never a mixed one
        for old in self.folder.glob("shard-*.bin"):
            old.unlink()
        try:
            for temporary, shard in zip(self._temporaries, self.shards, strict=True):
                os.replace(temporary, self.folder / shard["file"])
            sync_folder(self.folder)
            write_atomic(self.folder / INDEX, json.dumps(self._index(), separators=(",", ":")) + "\n")
        except BaseException:
            self.abort()
            for shard in self.shards:
                (self.folder / shard["file"]).unlink(missing_ok=True)
            raise
        self._temporaries = []

    def abort(self) -> None:
        """Remove what was written under temporary names."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
                self._file.close()
            self._file = None
        for temporary in self._temporaries:
            temporary.unlink(missing_ok=True)
        self._temporaries = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _open(self) -> None:
        name = f"shard-{len(self.shards):05d}.bin"
        temporary = self.folder / f".{name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
        self._temporaries.append(temporary)
        self._file, self._digest = open(temporary, "wb"), hashlib.sha256()  # noqa: SIM115 (open across calls)
        self.shards.append({"file": name, "tokens": 0, "sha256": ""})

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.shards[-1]["sha256"] = self._digest.hexdigest()

    def _index(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "dtype": self.dtype_name,
            "vocab_size": self.vocab_size,
            "tokens": self.tokens,
            "shards": self.shards,
            "sources": list(self.sources),
            "documents": {"offset": list(self.offsets), "source": list(self.owners), "hash": self.hashes},
        }


class Corpus:
    """A corpus on disk, memory-mapped: nothing is read until it is asked for."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Raises BadInput for a missing or inconsistent index, and for shards that are missing or of the wrong size."""
        self.folder = Path(folder)
        index = _read_index(self.folder / INDEX)
        try:
            self.dtype = DTYPES[index["dtype"]]
            self.vocab_size: int = index["vocab_size"]
            self.tokens: int = index["tokens"]
            self.shards: list[dict[str, Any]] = index["shards"]
            self.sources: list[str] = index["sources"]
            columns = index["documents"]
            self.starts = np.array(columns["offset"], np.uint64)
            self.source_ids = np.array(columns["source"], np.int64)
            self.hashes: list[str] = columns["hash"]
            self._ends = np.cumsum([shard["tokens"] for shard in self.shards], dtype=np.int64).tolist()
            sound = self._sound()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadInput(f"{self.folder / INDEX} lacks or misstates {error}; build the corpus again") from error
        if not sound:
            raise BadInput(f"{self.folder / INDEX} contradicts itself (offsets, counts or sources); build the corpus again")
        self.maps = [self._map(shard) for shard in self.shards]

    def _sound(self) -> bool:
        starts = self.starts
        return bool(
            len(starts) == len(self.source_ids) == len(self.hashes) > 0
            and all(isinstance(shard["file"], str) for shard in self.shards)
            and self._ends[-1:] == [self.tokens]
            and starts[0] == 0
            and (starts[1:] > starts[:-1]).all()
            and starts[-1] < self.tokens
            and 0 <= self.source_ids.min() <= self.source_ids.max() < len(self.sources)
        )

    def _map(self, shard: dict[str, Any]) -> np.ndarray:
        path = self.folder / Path(shard["file"]).name  # never outside the folder
        expected = shard["tokens"] * self.dtype.itemsize
        try:
            size = path.stat().st_size
            if size == expected:
                return np.memmap(path, dtype=self.dtype, mode="r")
        except (OSError, ValueError) as error:
            raise BadInput(f"{path} cannot be read: {error}; build the corpus again") from error
        raise BadInput(f"{path} has {size} bytes where the index says {expected}; it was cut off or changed, build the corpus again")

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.starts)

    def held_out(self, share: float) -> np.ndarray:
        """Which documents are the held-out `share` of all, bool [documents]: by their hash alone, so equal ones are on the same side."""
        return np.array([int(name, 16) for name in self.hashes], np.uint64) < np.uint64(int(share * 2**64))

    def document(self, i: int) -> np.ndarray:
        """Token ids of document i, 0 <= i < documents; raises IndexError beyond."""
        if not 0 <= i < len(self.starts):
            raise IndexError(f"document {i} of {len(self.starts)}")
        end = int(self.starts[i + 1]) if i + 1 < len(self.starts) else self.tokens
        return self.read(int(self.starts[i]), end)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens start..stop of the whole row, across shards; uint16 or uint32 [stop - start].

        Raises IndexError unless 0 <= start <= stop <= tokens.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} of {self.tokens}")
        return np.concatenate([np.empty(0, self.dtype), *self._parts(start, stop)])

    def _parts(self, start: int, stop: int) -> Iterator[np.ndarray]:
        shard = bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[shard - 1] if shard else 0
            end = min(stop, self._ends[shard])
            yield self.maps[shard][start - first : end - first]
            start, shard = end, shard + 1

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the index. Raises BadInput naming the shard that changed."""
        for shard, tokens in zip(self.shards, self.maps, strict=True):
            if hashlib.sha256(tokens.data).hexdigest() != shard["sha256"]:
                raise BadInput(f"{self.folder / shard['file']} is not what was written (SHA-256); build the corpus again")


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing; {path.parent} is not a corpus, or building it was not finished") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}; build the corpus again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise BadInput(f"{path} is not a corpus index of format {FORMAT}; build the corpus again")
    return index
