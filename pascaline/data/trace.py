"""Where a text was read: its longest verbatim spans in the token shards a model was trained on, with source and offset.

A span is a row of tokens of the text that also stands, token for token, inside one document. It is maximal when no longer
span of the text holds it; maximal spans may overlap. The shards are read once, in chunks, and nothing is kept on disk.

The text is encoded as it is, so give what the model wrote and nothing else (of a chat, only the answer). Where a text begins
or ends inside a word, or without the space that stood before it, its first and last tokens may be others than in the
document: a passage cut out by hand can lose a few tokens at both ends.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pascaline.data.shards import Corpus
from pascaline.errors import BadInput
from pascaline.progress import Progress
from pascaline.stopping import Interrupt
from pascaline.tokenizer import Tokenizer

SHARDS, TEXTS = Path("02-tokenizer", "shards"), Path("01-corpus", "documents.jsonl")  # in a run
CHUNK = 1 << 18  # tokens hashed at once: their hashes fit in the processor's cache
PAIRS = 1 << 16  # pairs (place in the text, place in the corpus) compared at once
GRAM = 16  # tokens of an n-gram at most: longer ones rule out little more
WINDOW = 16  # tokens of each compared in one step
FEW = 3  # occurrences told of each span
LONG = 1 << 26  # tokens from which a scan takes long enough (a second or two) to show its progress
SHOWN = 240  # characters of a span in the table
BASE, ODD = 0x9E3779B1, 0x85EBCA6B  # both odd: of the polynomial, and spreading its terms to the top bits
BORDER = 1 << 33  # above any code of a token: what stands before a document's first one
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # could steer a terminal


class Span(NamedTuple):
    """tokens start..stop of the text, how often they stand in the corpus, and the first places there (tokens of the whole row)."""

    start: int
    stop: int
    occurrences: int
    first: list[int]


def spans(ids: Sequence[int], corpus: Corpus, least: int, tell: Callable[[int], None] = lambda done: None) -> list[Span]:
    """All maximal spans of at least `least` tokens that a document holds, in the order of the text. Exact, with exact counts.

    ids: the text. tell: called with the number of corpus tokens read so far. Raises BadInput unless least >= 1. Memory: some
    16 MB, the borders of the documents, and some 100 bytes for each token of the text.
    """
    if least < 1:
        raise BadInput(f"a span of {least} tokens is none; --min-tokens must be at least 1.")
    text = np.array(ids, np.int64)
    if len(text) < least:
        return []
    grams, longest = _Grams(text, min(least, GRAM)), _Longest(len(text))
    borders = np.append(corpus.starts, np.uint64(corpus.tokens)).astype(np.int64)
    chunk = max(CHUNK, len(text))  # a chunk is read with as much of the next one as the text is long
    for start in range(0, corpus.tokens, chunk):
        stop = min(start + chunk, corpus.tokens)
        before = max(start - 1, 0)
        row = corpus.read(before, min(stop + len(text), corpus.tokens))
        row = np.concatenate([row, np.zeros(WINDOW, row.dtype)])
        for at, place in grams.pairs(row, before, start, stop, borders):
            room = np.minimum(len(text) - at, borders[np.searchsorted(borders, place, side="right")] - place)
            longest.add(at, place, _common(grams.padded, at, row, place - before, room))
        tell(stop)
    return longest.spans(least)


class _Grams:
    """The text's n-grams of `size` tokens by their hashes, and for each what stands before it.

    A span has to be compared from its first token only: n-grams with equal tokens before them belong to a longer one. So the
    pairs are as many as the common spans, and not as the common n-grams, of which a text of one repeated word has a square.
    """

    def __init__(self, text: np.ndarray, size: int):
        """text: int64 [N], N >= size."""
        self.size, self.padded = size, np.concatenate([text, np.zeros(WINDOW, np.int64)])
        hashes = _hashes(text.astype(np.uint32), size)
        self.keys, group = np.unique(hashes, return_inverse=True)
        codes = group * (BORDER << 1) + np.concatenate([[0], text[: len(group) - 1] + 1])
        self.at = np.argsort(codes, kind="stable")
        self.codes, group = codes[self.at], group[self.at]
        self.bounds = np.searchsorted(group, np.arange(len(self.keys) + 1))
        bits = max(12, (16 * len(self.keys)).bit_length())
        self.shift, self.marks = np.uint32(max(32 - bits, 0)), np.zeros(1 << min(bits, 32), bool)
        self.marks[self.keys >> self.shift] = True  # most n-grams of the corpus are ruled out by one look

    def pairs(self, row: np.ndarray, before: int, start: int, stop: int, borders: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(at, place), int64 each: text[at] and the corpus at `place`, start <= place < stop, begin equal n-grams (up to
        collisions of their hashes) after unequal tokens. row: the corpus from `before` on; places rise within each text[at]."""
        hashes = _hashes(row[start - before :].astype(np.uint32), self.size)[: stop - start]
        place = np.flatnonzero(self.marks[hashes >> self.shift])
        group = np.minimum(np.searchsorted(self.keys, hashes[place]), len(self.keys) - 1)
        same = self.keys[group] == hashes[place]
        place, group = place[same] + start, group[same]
        first = borders[np.searchsorted(borders, place, side="right") - 1] == place
        code = group * (BORDER << 1) + np.where(first, BORDER, row[place - before - 1].astype(np.int64) + 1)
        low, high = np.searchsorted(self.codes, code), np.searchsorted(self.codes, code, side="right")
        begin, skipped = self.bounds[group], high - low  # the whole group but codes low..high, of equal tokens before
        counts = self.bounds[group + 1] - begin - skipped
        ends = np.cumsum(counts)
        cuts = np.searchsorted(ends, np.arange(PAIRS, counts.sum(), PAIRS))
        for part in np.split(np.arange(len(place)), cuts):
            n = np.repeat(part, counts[part])
            entry = begin[n] + np.arange(len(n)) - (ends - counts)[n] + (ends - counts)[part[:1]].sum()
            yield self.at[entry + np.where(entry >= low[n], skipped[n], 0)], place[n]


class _Longest:
    """For each place of the text the longest span found to begin there, how often, and where first."""

    def __init__(self, size: int):
        self.stop, self.count = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.first: dict[int, list[int]] = {}

    def add(self, at: np.ndarray, place: np.ndarray, length: np.ndarray) -> None:
        """Spans of the text from `at` on, found at `place`; int64 [pairs] each."""
        known = self.stop.copy()
        np.maximum.at(self.stop, at, at + length)
        for i in np.flatnonzero(self.stop > known).tolist():
            self.count[i], self.first[i] = 0, []
        chosen = np.flatnonzero((at + length == self.stop[at]) & (length > 0))
        self.count += np.bincount(at[chosen], minlength=len(self.count))
        chosen = chosen[np.argsort(at[chosen], kind="stable")]
        begins, which = np.unique(at[chosen], return_index=True)
        for i, j in zip(begins.tolist(), which.tolist(), strict=True):
            same = chosen[j : j + FEW][at[chosen[j : j + FEW]] == i]
            self.first[i] += place[same[: FEW - len(self.first[i])]].tolist()

    def spans(self, least: int) -> list[Span]:
        found, end = list[Span](), 0
        for i in np.flatnonzero(self.stop - np.arange(len(self.stop)) >= least).tolist():
            if self.stop[i] > end:  # else an earlier one holds it
                end = int(self.stop[i])
                found.append(Span(i, end, int(self.count[i]), self.first[i]))
        return found


def _hashes(tokens: np.ndarray, size: int) -> np.ndarray:
    """uint32 [max(0, tokens - size + 1)]: a polynomial in BASE mod 2^32 for each n-gram of `size` tokens, spread to the top bits."""
    count = max(0, len(tokens) - size + 1)
    total = tokens[:count].copy()
    for i in range(1, size):
        total *= np.uint32(BASE)
        total += tokens[i : i + count]
    total *= np.uint32(ODD)
    return total


def _common(text: np.ndarray, at: np.ndarray, row: np.ndarray, place: np.ndarray, room: np.ndarray) -> np.ndarray:
    """int64 [pairs]: how many tokens agree from text[at] and row[place] on, `room` at most. Both arrays end in WINDOW tokens more."""
    texts, rows = (np.lib.stride_tricks.sliding_window_view(tokens, WINDOW) for tokens in (text, row))
    length, live = np.zeros(len(at), np.int64), np.arange(len(at))
    while len(live):
        same = texts[at[live] + length[live]] == rows[place[live] + length[live]]
        run = np.where(same.all(1), WINDOW, same.argmin(1))
        length[live] += run
        live = live[(run == WINDOW) & (length[live] < room[live])]
    return np.minimum(length, room)


def trace(model: Path, text: str, limit: int = 10, least: int = 8, quiet: bool = False) -> dict[str, Any]:
    """What of `text` stands in the corpus of the run that `model` is, or is a folder of; plain JSON values.

    spans: the `limit` longest, one entry for all equal ones. characters, covered_characters: ranges of the text. found: the first
    few occurrences; offset is in tokens from the document's first one, which is its begin token. Raises BadInput for an empty
    text, a folder without shards and numbers below 1, Stopped on Ctrl-C.
    """
    if not text:
        raise BadInput("the text is empty; give what the model wrote, or - to read it from standard input.")
    if limit < 1:
        raise BadInput(f"{limit} spans cannot be listed; --limit must be at least 1.")
    run = _run(model)
    corpus, tokenizer = Corpus(run / SHARDS), Tokenizer.load((run / SHARDS).parent)
    ids = tokenizer.encode(text)
    with Interrupt() as stop, Progress("trace", corpus.tokens, "token", enabled=not quiet and corpus.tokens >= LONG) as progress:

        def tell(done: int) -> None:
            progress.update(done)
            if stop.requested:
                raise stop.stopped("stopped while reading the token shards")

        found = spans(ids, corpus, least, tell)
    covered = _united(found)
    tokens = sum(stop - start for start, stop in covered)
    letters = _letters(tokenizer, ids, text, {cut for span in found for cut in span[:2]})
    alike: dict[tuple[int, ...], list[Span]] = {}
    for span in sorted(found, key=lambda span: span.start - span.stop):
        alike.setdefault(tuple(ids[span.start : span.stop]), []).append(span)
    told = {"shards": str(run / SHARDS), "documents": corpus.documents, "corpus_tokens": corpus.tokens, "min_tokens": least}
    told |= {"text": text, "text_tokens": len(ids), "covered_tokens": tokens, "covered": tokens / len(ids)}
    told |= {"covered_characters": [[letters[start], letters[stop]] for start, stop in covered], "different_spans": len(alike)}
    return told | {"spans": _listed(run, corpus, list(alike.values())[:limit], letters, text)}


def _run(model: Path) -> Path:
    """The run's folder: the given one, or the nearest of the two above it that has shards."""
    folder = model.resolve()
    if not folder.is_dir():
        raise BadInput(f"there is no folder {model}.")
    for run in (folder, *folder.parents[:2]):
        if (run / SHARDS).is_dir():
            return run
    raise BadInput(f"{model} has no token shards beside it ({SHARDS}); give a run of this program or a model folder in it.")


def _united(found: Sequence[Span]) -> list[tuple[int, int]]:
    """The spans, in the order of the text, with those that overlap as one."""
    parts: list[tuple[int, int]] = []
    for start, stop, *_ in found:
        if parts and start < parts[-1][1]:
            start = parts.pop()[0]
        parts.append((start, stop))
    return parts


def _letters(tokenizer: Tokenizer, ids: Sequence[int], text: str, cuts: Collection[int]) -> dict[int, int]:
    """For each cut (a number of tokens) how many characters of the text are whole before it (U+FFFD may count too early)."""
    letters, clean, base, last = dict[int, int](), 0, 0, 0
    for cut in sorted(cuts):
        piece = tokenizer.decode(ids[clean:cut])
        whole = text.startswith(piece, base)  # else the cut goes through the bytes of a character, of which U+FFFD is made
        last = letters[cut] = max(last, base + len(piece if whole else piece.rstrip("\ufffd")))
        if whole and not piece.endswith("\ufffd"):
            clean, base = cut, last
    return letters


def _listed(run: Path, corpus: Corpus, alike: Sequence[Sequence[Span]], letters: dict[int, int], text: str) -> list[dict[str, Any]]:
    """One object for each group of equal spans."""
    found = _found(run, corpus, [row for same in alike for row in same[0].first])
    listed = []
    for same in alike:
        characters = [[letters[span.start], letters[span.stop]] for span in same]
        told: dict[str, Any] = {"text": text[slice(*characters[0])], "tokens": same[0].stop - same[0].start}
        told |= {"characters": characters, "occurrences": same[0].occurrences, "found": [found[row] for row in same[0].first]}
        listed.append(told)
    return listed


def _found(run: Path, corpus: Corpus, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
    """For tokens of the whole row: the document, its source and id (null where the texts are not there), the offset in it."""
    numbers = (np.searchsorted(corpus.starts, np.array(rows, np.uint64), side="right") - 1).tolist()
    texts, wanted, names = run / TEXTS, set(numbers), dict[int, dict[str, Any]]()
    if wanted and texts.is_file():
        with open(texts, "rb") as file:
            lines = [(n, line) for n, line in enumerate(islice(file, max(wanted) + 1)) if n in wanted]
        with contextlib.suppress(ValueError):  # a damaged line: there are numbers still
            names = {n: document for n, line in lines if isinstance(document := json.loads(line), dict)}
    found = {}
    for row, number in zip(rows, numbers, strict=True):
        source, name = corpus.sources[corpus.source_ids[number]], names.get(number, {})
        id = name.get("id") if name.get("source") == source else None  # else the texts are of another corpus
        found[row] = {"document": number, "source": source, "id": id, "offset": row - int(corpus.starts[number])}
    return found


def read_text(text: str) -> str:
    """The text itself, or what standard input holds for "-". Raises BadInput where that is not UTF-8."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"standard input is not UTF-8 text: {error}.") from None


def show(told: dict[str, Any]) -> None:
    """Print what `trace` told: the text with its covered parts marked, the share, a table of the spans."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    opening, closing = ("\u27e6", "\u27e7") if console.color_system is None or console.no_color else ("", "")
    text, end, marked = told["text"].translate(_CONTROL), 0, Text()
    for start, stop in told["covered_characters"]:
        marked.append(text[end:start]).append(f"{opening}{text[start:stop]}{closing}", "bold green")
        end = stop
    console.print(marked.append(text[end:]), soft_wrap=True)
    console.print(f"\n{_summary(told)}")
    if not told["spans"]:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tokens", "times"):
        table.add_column(name, justify="right")
    for name in ("span", "found in"):
        table.add_column(name, overflow="fold")
    for span in told["spans"]:
        words = span["text"].translate(_CONTROL).replace("\n", "\u21b5").replace("\t", " ")
        words = words if len(words) <= SHOWN else f"{words[: SHOWN // 2]} ... {words[-SHOWN // 2 :]}"
        places = [f"{p['source']} {p['id'] or p['document']}, token {p['offset']:,}".translate(_CONTROL) for p in span["found"]]
        places += ["..."] * (span["occurrences"] > len(places))
        table.add_row(f"{span['tokens']:,}", f"{span['occurrences']:,}", Text(words), Text("\n".join(places)))
    console.print(table)


def _summary(told: dict[str, Any]) -> str:
    size, least, spans = told["text_tokens"], told["min_tokens"], told["different_spans"]
    if size < least:
        return f"The text has {size} tokens; spans shorter than {least} are not looked for (--min-tokens)."
    corpus = f"{told['documents']:,} documents ({told['corpus_tokens']:,} tokens)"
    if not spans:
        return f"No {least} tokens in a row of the text's {size:,} stand in the {corpus}."
    shown = len(told["spans"])
    count = f"the {shown} longest of {spans:,} spans" if shown < spans else f"{spans} span{'s' * (spans > 1)}"
    share = f"{told['covered_tokens']:,} of {size:,} tokens ({told['covered']:.1%})"
    return f"{share} are covered by spans of at least {least} tokens that stand in the {corpus}; {count}:"
