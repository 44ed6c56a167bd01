"""Where text comes from: Python's own standard library, or the files and folders that the user names.

Whatever is passed over is told to `excluded`, so that nothing goes missing in silence.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from pascaline.errors import BadInput, nearest

STDLIB = "stdlib"
# Not text worth learning from: tests of everything, other people's packages, tables of code points, a dead parser.
STDLIB_SKIPS = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3", "encodings"})
WHOLE = (".txt", ".md", ".py")  # one text, cut into pieces at line ends
SUFFIXES = (*WHOLE, ".jsonl", ".parquet")
PIECE = 16_384  # bytes; a longer text is cut so that no document is endless
BLOCK = 1 << 20
SHOWN = 200  # characters of an excluded text that are kept
SURROGATE = re.compile("[\ud800-\udfff]")

Excluded = Callable[[dict[str, Any]], None]


class Document(NamedTuple):
    """A text, the source it comes from as the user named it, and its place there: path:piece, path:line or path:row."""

    text: str
    source: str
    id: str


def documents(sources: list[str], max_bytes: int | None, excluded: Excluded) -> Iterator[Document]:
    """Documents of all sources, at most `max_bytes` of UTF-8 in sum, always in the same order.

    A source is "stdlib", a file or a folder (walked in sorted order): .txt, .md and .py in pieces of at most PIECE
    bytes, .jsonl and .parquet one document for each `text`. Of several sources the one that has given the fewest
    bytes goes next, so that a budget is shared evenly. Each file or row left out is passed to `excluded` as {"id",
    "source", "filter", "value", "text"}; `filter` is one of folder, suffix, unreadable, binary, encoding, empty, json,
    column.

    Raises BadInput at once for a path that is not there, and on iteration when nothing at all was found.
    """
    places = [(source, _locate(source)) for source in sources]
    return _drawn(places, max_bytes, excluded)


def _locate(source: str) -> Path:
    if source == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    path = Path(source).expanduser()
    if path.exists():
        return path
    try:
        siblings = {str(path.parent / name): name for name in os.listdir(path.parent)}
    except OSError:
        siblings = {}
    raise BadInput(f"corpus source '{source}' is neither a file nor a folder{nearest(source, siblings)}")


def _drawn(places: list[tuple[str, Path]], max_bytes: int | None, excluded: Excluded) -> Iterator[Document]:
    skipped: list[dict[str, Any]] = []

    def note(entry: dict[str, Any]) -> None:
        if not skipped:
            skipped.append(entry)
        excluded(entry)

    streams = [_stdlib(path, note) if source == STDLIB else _files(source, path, note) for source, path in places]
    given = dict.fromkeys(range(len(streams)), 0)
    total = 0
    while given and (max_bytes is None or total < max_bytes):
        turn = min(given, key=lambda index: (given[index], index))
        document = next(streams[turn], None)
        if document is None:
            del given[turn]
            continue
        data = document.text.encode()
        if max_bytes is not None and total + len(data) > max_bytes:
            data = data[: max_bytes - total]
            document = document._replace(text=data.decode(errors="ignore"))  # only a cut character is ignored
        total += len(data)
        given[turn] += len(data)
        if document.text:
            yield document
    if not total:
        because = f"; for one, {skipped[0]['id']} was left out ({skipped[0]['filter']})" if skipped else ""
        raise BadInput(
            f"corpus sources {[source for source, _ in places]} give an empty corpus{because}; "
            f"name files or folders with {', '.join(SUFFIXES)}"
        )


def _stdlib(root: Path, excluded: Excluded) -> Iterator[Document]:
    """The standard library's .py files, in the order of a hash of their path: any prefix samples widely."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPS and not name.startswith("config-")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    for name in sorted(found, key=lambda name: blake2b(name.encode(errors="surrogateescape")).digest()):
        yield from _pieces(root / name, STDLIB, name, excluded)


def _files(source: str, root: Path, excluded: Excluded) -> Iterator[Document]:
    """One named file, or everything under a folder in sorted order; hidden folders are left out, and said so."""
    if not root.is_dir():
        yield from _file(root, source, root.name, excluded)
        return

    def failed(error: OSError) -> None:
        path = Path(error.filename or root)
        exclude(excluded, source, path.relative_to(root).as_posix(), "unreadable", error.strerror, "")

    for folder, folders, names in os.walk(root, onerror=failed):
        place = Path(folder)
        for name in sorted(folders):
            if name.startswith(".") or name == "__pycache__":
                exclude(excluded, source, (place / name).relative_to(root).as_posix(), "folder", name, "")
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            yield from _file(place / name, source, (place / name).relative_to(root).as_posix(), excluded)


def _file(path: Path, source: str, name: str, excluded: Excluded) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        exclude(excluded, source, name, "suffix", path.suffix, "")
    elif not path.is_file():  # a pipe would block for ever, a dangling link has no text
        exclude(excluded, source, name, "unreadable", "not a regular file", "")
    elif suffix in WHOLE:
        yield from _pieces(path, source, name, excluded)
    elif suffix == ".jsonl":
        yield from _jsonl(path, source, name, excluded)
    else:
        yield from _parquet(path, source, name, excluded)


def _pieces(path: Path, source: str, name: str, excluded: Excluded) -> Iterator[Document]:
    """The text in pieces that end where a line ends; only a line of over PIECE // 4 characters may be cut inside.

    The file is read twice, the first time to see that all of it is text: half a file is never used.
    """
    try:
        problem = _unfit(path)
        if problem:
            with open(path, "rb") as raw:
                exclude(excluded, source, name, *problem, raw.read(SHOWN).decode(errors="replace"))
            return
        with open(path, encoding="utf-8-sig", newline="") as file:  # newline="": line ends stay as they are
            number, size, lines = 0, 0, list[str]()
            while line := file.readline(PIECE // 4):  # a character has at most four bytes
                length = len(line.encode())
                if size + length > PIECE:
                    yield Document("".join(lines), source, f"{name}:{number}")
                    number, size, lines = number + 1, 0, []
                size += length
                lines.append(line)
            yield Document("".join(lines), source, f"{name}:{number}")
    except (OSError, UnicodeError) as error:  # unreadable, or changed between the two readings
        exclude(excluded, source, name, "unreadable", str(error), "")


def _unfit(path: Path) -> tuple[str, Any] | None:
    """(filter, value) if the file is not text: the offset of its first NUL byte or its first bad one, or its size."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, blank = 0, True
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            if b"\0" in block:
                return "binary", offset + block.index(b"\0")
            try:
                blank = not decoder.decode(block).replace("\ufeff", "").strip() and blank
            except UnicodeDecodeError as error:
                return "encoding", offset + error.start
            offset += len(block)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "encoding", offset
    return ("empty", offset) if blank else None


def _jsonl(path: Path, source: str, name: str, excluded: Excluded) -> Iterator[Document]:
    """The `text` of each line, read one line at a time."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{name}:{number}"
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    wrong = "encoding" if isinstance(error, UnicodeDecodeError) else "json"
                    exclude(excluded, source, place, wrong, str(error), line[:SHOWN].decode(errors="replace"))
                    continue
                text = row.get("text") if isinstance(row, dict) else None
                yield from _value(text, source, place, excluded)
            if not path.stat().st_size:
                exclude(excluded, source, name, "empty", 0, "")
    except OSError as error:
        exclude(excluded, source, name, "unreadable", str(error), "")


def _parquet(path: Path, source: str, name: str, excluded: Excluded) -> Iterator[Document]:
    """The `text` column, one batch of rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput(f"reading {path} needs pyarrow; install the extra: pip install 'pascaline[hub]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                exclude(excluded, source, name, "column", ", ".join(file.schema_arrow.names), "")
                return
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield from _value(text, source, f"{name}:{number}", excluded)
                    number += 1
    except (OSError, pyarrow.ArrowException, UnicodeError) as error:
        exclude(excluded, source, name, "unreadable", str(error), "")


def _value(text: Any, source: str, place: str, excluded: Excluded) -> Iterator[Document]:
    """One row's text, if it is fit to use."""
    if not isinstance(text, str):
        exclude(excluded, source, place, "column", f"text is {type(text).__name__}", "")
    elif not text.strip():
        exclude(excluded, source, place, "empty", len(text), text)
    elif "\0" in text:
        exclude(excluded, source, place, "binary", text.index("\0"), text)
    elif not text.isascii() and SURROGATE.search(text):  # JSON can say half a character
        exclude(excluded, source, place, "encoding", "lone surrogate", text)
    else:
        yield Document(text, source, place)


def exclude(excluded: Excluded, source: str, place: str, name: str, value: Any, text: str) -> None:
    """Tell `excluded` what was left out: {"id", "source", "filter", "value", "text"}, at most SHOWN characters of it."""
    shown = text[:SHOWN].encode(errors="replace").decode()
    where = place.encode(errors="replace").decode()  # file names can hold bytes that are not UTF-8
    excluded({"id": where, "source": source, "filter": name, "value": value, "text": shown})
