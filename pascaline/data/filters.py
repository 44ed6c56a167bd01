"""Quality filters as published, and `apply`, which runs any and keeps what they throw away; our own are in quality.py.

A filter takes a text and returns the text that goes on (the same object if nothing was cut) or a Reason, whose `rule` is
the keyword that would have to be changed to let the text pass; a text at the threshold passes. Words are what stands
between white space, so languages that write none need other filters; blank lines do not count. Both are worked out once
per text and shared by the filters. Nothing takes longer than in proportion to the text.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pascaline.data.sources import Document, Excluded, exclude

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "-", "*", "‣", "▪", "◦", "–")
ELLIPSES = ("...", "…")
SENTENCE_ENDS = tuple(".!?。．｡！？؟۔।॥։።፧។။‼⁇⁈⁉")
PUNCTUATION = string.punctuation + "“”‘’«»…–—•"
C4_ENDS = (".", "!", "?", '"', "'", "”", "’")
C4_UNWANTED = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
C4_FORBIDDEN = ("{", "lorem ipsum")
TOP_NGRAMS: Mapping[int, float] = MappingProxyType({2: 0.20, 3: 0.18, 4: 0.16})
DUPLICATE_NGRAMS: Mapping[int, float] = MappingProxyType({5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})

_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_SENTENCE = re.compile(r"""[.!?]["'”’)\]]*(?=\s|$)""")
_BLANK_LINES = re.compile(r"\n\s*\n")
_NOT_LETTERS_NOR_SPACE = bytes(byte for byte in range(128) if not chr(byte).isalpha() and byte not in b" \t\n\r\v\f")


class Reason(NamedTuple):
    """Why a text does not pass: the filter's keyword whose threshold it broke, and what was measured (JSON-able)."""

    rule: str
    value: float | str


Filter = Callable[[str], str | Reason]


def apply(documents: Iterable[Document], filters: Sequence[tuple[str, Filter]], excluded: Excluded) -> Iterator[Document]:
    """The documents that pass every (name, filter), in order, as the filters leave them.

    The others are passed to `excluded` as {"id", "source", "filter", "value", "text"}: `filter` is "name.rule" of the first
    that failed, `text` the first SHOWN characters as they came in.
    """
    for document in documents:
        yield from settle(document, judge(document.text, filters), excluded)


def judge(text: str, filters: Sequence[tuple[str, Filter]]) -> str | Reason:
    """The text as all filters leave it, the same object if nothing was cut, or the first Reason, its rule as "name.rule"."""
    for name, passes in filters:
        verdict = passes(text)
        if isinstance(verdict, Reason):
            return Reason(f"{name}.{verdict.rule}", verdict.value)
        text = verdict
    return text


def settle(document: Document, verdict: str | Reason, excluded: Excluded) -> Iterator[Document]:
    """The document with the text that `judge` left; none if there was a Reason, which is passed to `excluded`."""
    if isinstance(verdict, Reason):
        exclude(excluded, document.source, document.id, verdict.rule, verdict.value, document.text)
    else:
        yield document if verdict is document.text else document._replace(text=verdict)


# ---- what the filters look at ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """A text seen in the ways that more than one filter needs; each is worked out when it is first asked for."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Without the white space around them; blank ones are left out."""
        return [stripped for line in self.text.splitlines() if (stripped := line.strip())]

    @cached_property
    def squeezed(self) -> str:
        """With one space for all white space between two words."""
        return " ".join(self.words)

    @cached_property
    def lower(self) -> str:
        return self.squeezed.lower()

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def duplicate_lines(self) -> tuple[int, int]:
        return _duplicates(self.lines)


# Identity is tried before equality and a string keeps its hash, so that a hit costs nothing; two, because c4 edits.
views = lru_cache(maxsize=2)(Views)


def _duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts were there before, and how many characters they have."""
    unique = set(parts)
    return len(parts) - len(unique), sum(map(len, parts)) - sum(map(len, unique))


# ---- Gopher ------------------------------------------------------------------------------------------------------------


def gopher_quality(
    text: str,
    *,
    min_words: int = 50,
    max_words: int = 100_000,
    min_word_length: float = 3,
    max_word_length: float = 10,
    max_symbols: float = 0.1,
    max_bullet_lines: float = 0.9,
    max_ellipsis_lines: float = 0.3,
    min_letter_words: float = 0.8,
    min_stop_words: int = 2,
    stop_words: frozenset[str] = STOP_WORDS,
) -> str | Reason:
    """Does it look like prose? Gopher's quality rules (Rae et al. 2021, arXiv 2112.11446, appendix A1.1).

    Number of words and their mean length; '#' and ellipses per word, each; lines that begin with a bullet and lines that end
    in an ellipsis, as shares; share of words with a letter; how many different stop words there are, in any case.
    """
    view = views(text)
    words, lines = view.words, view.lines
    if len(words) < min_words:
        return Reason("min_words", len(words))
    if len(words) > max_words:
        return Reason("max_words", len(words))
    if not words:
        return text
    if (mean := float(view.lengths.mean())) < min_word_length:
        return Reason("min_word_length", mean)
    if mean > max_word_length:
        return Reason("max_word_length", mean)
    if (symbols := max(text.count("#"), sum(map(text.count, ELLIPSES))) / len(words)) > max_symbols:
        return Reason("max_symbols", symbols)
    if (bullets := sum(line.startswith(BULLETS) for line in lines) / len(lines)) > max_bullet_lines:
        return Reason("max_bullet_lines", bullets)
    if (ellipses := sum(line.endswith(ELLIPSES) for line in lines) / len(lines)) > max_ellipsis_lines:
        return Reason("max_ellipsis_lines", ellipses)
    if (letters := _with_letter(view, min_letter_words)) < min_letter_words:
        return Reason("min_letter_words", letters)
    if len(stop_words.intersection(words)) < min_stop_words:  # first the cheap way, then as a reader would
        found = stop_words.intersection(word.strip(PUNCTUATION) for word in view.lower.split())
        if len(found) < min_stop_words:
            return Reason("min_stop_words", len(found))
    return text


def _with_letter(view: Views, enough: float) -> float:
    """Share of words with a letter, or only of those with an ASCII letter if these are enough: ten times as fast."""
    letters = view.text.encode("ascii", "ignore").translate(None, _NOT_LETTERS_NOR_SPACE)  # may join words, splits none
    if (share := len(letters.split()) / len(view.words)) >= enough:
        return share
    return sum(any(map(str.isalpha, word)) for word in view.words) / len(view.words)


def gopher_repetition(
    text: str,
    *,
    max_duplicate_lines: float = 0.3,
    max_duplicate_line_characters: float = 0.2,
    max_duplicate_paragraphs: float = 0.3,
    max_duplicate_paragraph_characters: float = 0.2,
    top_ngrams: Mapping[int, float] = TOP_NGRAMS,
    duplicate_ngrams: Mapping[int, float] = DUPLICATE_NGRAMS,
) -> str | Reason:
    """Does it repeat itself? Gopher's repetition rules (Rae et al. 2021, arXiv 2112.11446, table A1).

    Lines and paragraphs that were there before, as a share of their number and of the text's characters. Then, as a share of
    the characters of all words, {n: limit} for n of 2 or more: the most frequent n-gram times its occurrences, and the words
    in any n-gram that was there before. The rule of an n-gram is named "top_ngrams.3".
    """
    view = views(text)
    if view.duplicate_lines[0]:  # a paragraph that was there before is made of such lines
        paragraphs = [stripped for part in _BLANK_LINES.split(text) if (stripped := part.strip())]
        number, characters = view.duplicate_lines
        if (share := number / len(view.lines)) > max_duplicate_lines:
            return Reason("max_duplicate_lines", share)
        if (share := characters / len(text)) > max_duplicate_line_characters:
            return Reason("max_duplicate_line_characters", share)
        number, characters = _duplicates(paragraphs)
        if (share := number / len(paragraphs)) > max_duplicate_paragraphs:
            return Reason("max_duplicate_paragraphs", share)
        if (share := characters / len(text)) > max_duplicate_paragraph_characters:
            return Reason("max_duplicate_paragraph_characters", share)
    for rule, n, share in _ngram_shares(view, top_ngrams, duplicate_ngrams):
        if share > (top_ngrams if rule == "top_ngrams" else duplicate_ngrams)[n]:
            return Reason(f"{rule}.{n}", share)
    return text


def _ngram_shares(view: Views, top: Mapping[int, float], duplicate: Mapping[int, float]) -> Iterator[tuple[str, int, float]]:
    """(rule, n, share of characters) for n from small to large, as long as a limit can still be broken.

    An (n+1)-gram can occur twice only where the n-grams at i and i + 1 both do: each step looks at what the last has left,
    and of ordinary prose little is left after two. Its number comes from those of its two halves by sorting: nothing is
    approximate.
    """
    words = view.words
    if len(words) < 2:
        return
    number = dict(zip(words, range(len(words)), strict=True))  # of a word: where it is last
    gram = np.fromiter(map(number.__getitem__, words), np.int64, len(words))
    ends = np.concatenate(([0], np.cumsum(view.lengths)))
    total = int(ends[-1])
    again = np.bincount(gram)[gram] > 1
    for n in range(2, max([*top, *duplicate], default=0) + 1):
        starts = np.flatnonzero(again[:-1] & again[1:])
        if not len(starts):
            return
        pairs = gram[starts] * len(words) + gram[starts + 1]
        _, first, inverse, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        if (most := counts.max()) < 2:
            return
        if n in top:
            at = starts[first[counts == most]]
            yield "top_ngrams", n, min(1.0, float(most * (ends[at + n] - ends[at]).max() / total))
        if n in duplicate:
            later = np.ones(len(starts), bool)
            later[first] = False
            share = float(view.lengths[_covered(starts[later], n, len(words))].sum() / total)
            yield "duplicate_ngrams", n, share
            # what longer n-grams cover lies inside what this one covers
            if share <= min((limit for m, limit in duplicate.items() if m > n), default=1.0) and n >= max(top, default=0):
                return
        gram, again = np.zeros(len(gram) - 1, np.int64), np.zeros(len(again) - 1, bool)
        gram[starts], again[starts] = inverse, counts[inverse] > 1


def _covered(starts: NDArray[np.int64], n: int, size: int) -> NDArray[np.bool_]:
    """True for each of `size` words that lies in one of the n-grams at `starts`."""
    steps = np.zeros(size + 1, np.int64)
    steps[starts] += 1
    steps[starts + n] -= 1  # starts are distinct
    return np.cumsum(steps[:-1]) > 0


# ---- C4 and FineWeb ----------------------------------------------------------------------------------------------------


def c4(
    text: str,
    *,
    min_sentences: int = 5,
    min_line_words: int = 3,
    max_word_length: int = 1000,
    unwanted: Sequence[str] = C4_UNWANTED,
    forbidden: Sequence[str] = C4_FORBIDDEN,
) -> str | Reason:
    """The text with only those lines that look like sentences (Raffel et al. 2020, arXiv 1910.10683, section 2.2).

    A line goes if it does not end in . ! ? or a quote (an ellipsis does not count), has too few words or one too long, or
    contains one of `unwanted`; marks such as [12], [edit] and [citation needed] are cut out. The page goes if a line that would
    be kept contains one of `forbidden`, or if too few sentences are left. Both lists are in lower case, and match any case.
    """
    view = views(text)
    unwanted, forbidden = ([phrase for phrase in phrases if phrase in view.lower] for phrases in (unwanted, forbidden))
    kept = []
    for line in view.lines:
        line = _CITATION.sub("", line).rstrip() if "[" in line else line
        if not line.endswith(C4_ENDS) or line.endswith(ELLIPSES):
            continue
        words = line.split(None, min_line_words)  # enough to count so far
        if len(words) < min_line_words or (len(line) > max_word_length and max(map(len, line.split())) > max_word_length):
            continue
        if unwanted and any(map(line.lower().__contains__, unwanted)):
            continue
        if forbidden and (found := next(filter(line.lower().__contains__, forbidden), None)):
            return Reason("forbidden", found)
        kept.append(line)
    sentences = len(kept)  # a line is one sentence at least
    if sentences < min_sentences:
        sentences = sum(max(1, sum(1 for _ in _SENTENCE.finditer(line))) for line in kept)
    if sentences < min_sentences or not kept:
        return Reason("min_sentences", sentences)
    cleaned = "\n".join(kept)
    return text if cleaned == text else cleaned


def fineweb(
    text: str,
    *,
    min_punctuated_lines: float = 0.12,
    max_short_lines: float = 0.67,
    short_line: int = 30,
    max_duplicate_characters: float = 0.01,
    max_newlines: float = 0.3,
) -> str | Reason:
    """Is it more than a list? FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557, section 3.6; limits of its code).

    Share of lines that end a sentence, of lines under `short_line` characters, of the characters outside line ends that are
    in lines seen before; line ends per word.
    """
    view = views(text)
    lines = view.lines
    if not lines:
        return Reason("min_punctuated_lines", 0.0)
    if (ended := sum(line.endswith(SENTENCE_ENDS) for line in lines) / len(lines)) < min_punctuated_lines:
        return Reason("min_punctuated_lines", ended)
    if (short := sum(len(line) < short_line for line in lines) / len(lines)) > max_short_lines:
        return Reason("max_short_lines", short)
    newlines = text.count("\n")
    if (share := view.duplicate_lines[1] / (len(text) - newlines)) > max_duplicate_characters:
        return Reason("max_duplicate_characters", share)
    if (ratio := newlines / len(view.words)) > max_newlines:
        return Reason("max_newlines", ratio)
    return text
