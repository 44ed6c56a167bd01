"""Filters: each rule holds at its threshold and breaks just past it, whatever the text; nothing goes missing."""

import json
from functools import partial
from itertools import islice, product
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.data.filters import (
    C4_ENDS,
    C4_UNWANTED,
    DUPLICATE_NGRAMS,
    TOP_NGRAMS,
    Reason,
    Views,
    _ngram_shares,
    apply,
    c4,
    fineweb,
    gopher_quality,
    gopher_repetition,
)
from pascaline.data.sources import Document

PUBLISHED = [gopher_quality, gopher_repetition, c4, fineweb]


def different(count, length=5):
    """So many different words, each so long and none a stop word."""
    return ["z" * (length - 3) + "".join(letters) for letters in islice(product(ascii_lowercase, repeat=3), count)]


def prose(count, *others, length=5):
    """A text of `count` words: the others first, then two stop words, then different ones."""
    return " ".join([*others, "the", "of", *different(count - 2 - len(others), length)])


def in_lines(words, per_line, first="", last="", marked=0):
    """The words in lines, the first `marked` of which begin and end as told."""
    lines = [" ".join(words[start : start + per_line]) for start in range(0, len(words), per_line)]
    return "\n".join(first + line + last if number < marked else line for number, line in enumerate(lines))


def holds(filter, good, bad, rule, value):
    """The good text passes as it is, the bad one breaks this very rule with this value."""
    assert filter(good) is good
    verdict = filter(bad)
    assert isinstance(verdict, Reason) and verdict.rule == rule
    assert verdict.value == (value if isinstance(value, str) else pytest.approx(value))
    json.dumps(verdict.value, allow_nan=False)


# ---- Gopher ------------------------------------------------------------------------------------------------------------


FIFTY, HUNDRED = prose(50).split(), prose(100).split()
THREES = ["the", "and"] * 25  # 150 letters
TENS = ["the", "and", *["z" * 10] * 46, "z" * 17, "z" * 17]  # 500 letters
QUALITY = {
    "min_words": (prose(50), prose(49), 49),
    "max_words": (prose(50) + " word" * 99_950, prose(50) + " word" * 99_951, 100_001),
    "min_word_length": (" ".join(THREES), " ".join([*THREES[:-1], "of"]), 149 / 50),
    "max_word_length": (" ".join(TENS), " ".join([*TENS[:-1], "z" * 18]), 501 / 50),
    "max_symbols": (prose(50, *["#zap"] * 5), prose(50, *["#zap"] * 6), 6 / 50),
    "max_bullet_lines": (in_lines(FIFTY, 5, first="-", marked=9), in_lines(FIFTY, 5, first="  • ", marked=10), 1.0),
    "max_ellipsis_lines": (in_lines(HUNDRED, 10, last="...", marked=3), in_lines(HUNDRED, 10, last="…  ", marked=4), 0.4),
    "min_letter_words": (prose(50, *["12345"] * 10), prose(50, *["12345"] * 11), 39 / 50),
    "min_stop_words": (prose(50), prose(50).replace("of", "the"), 1),
}


@pytest.mark.parametrize(
    ("filter", "defaults"),
    [
        (gopher_quality, [50, 100_000, 3, 10, 0.1, 0.9, 0.3, 0.8, 2, {"the", "be", "to", "of", "and", "that", "have", "with"}]),
        (gopher_repetition, [0.3, 0.2, 0.3, 0.2, TOP_NGRAMS, DUPLICATE_NGRAMS]),
        (c4, [5, 3, 1000, C4_UNWANTED, ("{", "lorem ipsum")]),
        (fineweb, [0.12, 0.67, 30, 0.01, 0.3]),
    ],
)
def test_the_defaults_are_the_published_limits(filter, defaults):
    assert list(filter.__kwdefaults__.values()) == defaults
    assert TOP_NGRAMS == {2: 0.2, 3: 0.18, 4: 0.16}
    assert DUPLICATE_NGRAMS == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}


@pytest.mark.parametrize("rule", QUALITY)
def test_gopher_quality(rule):
    good, bad, value = QUALITY[rule]
    holds(gopher_quality, good, bad, rule, value)


def test_gopher_quality_reads_ellipses_letters_and_stop_words_of_every_kind():
    holds(gopher_quality, prose(50, *["zap..."] * 2, *["zap…"] * 3), prose(50, *["zap..."] * 3, *["zap…"] * 3), "max_symbols", 6 / 50)
    holds(gopher_quality, prose(50, *["слово"] * 20), prose(50, *["٣٤٥٦٧"] * 20), "min_letter_words", 30 / 50)
    shouted = prose(50).replace("the", "(The").replace("of", "OF,")
    assert gopher_quality(shouted) is shouted
    assert gopher_quality(" \n ") == Reason("min_words", 0)
    assert gopher_quality("", min_words=0) == ""


@given(st.text(alphabet="aé1. \n\x1c\u2003名-", max_size=10), st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_words_with_a_letter_are_counted_the_fast_way_as_the_slow(text, least):
    words = text.split()
    share = sum(any(map(str.isalpha, word)) for word in words) / len(words) if words else 1.0
    expected = text if share >= least else Reason("min_letter_words", share)
    others = {"min_words": 0, "min_word_length": 0, "max_symbols": 9, "max_bullet_lines": 1, "max_ellipsis_lines": 1, "min_stop_words": 0}
    assert gopher_quality(text, min_letter_words=least, **others) == expected


def lines_of(*lengths):
    return ["".join(word) for word in zip(different(len(lengths), 3), ["y" * (length - 3) for length in lengths], strict=True)]


def test_gopher_duplicate_lines():
    long = lines_of(*[30] * 9)
    good = "\n".join(["q", *long[:3], "q", *long[3:5], "q", long[5], "  q "])  # indented or not, it was there
    bad = "\n".join(["q", *long[:2], "q", long[2], "q", *long[3:5], "q", "q"])
    holds(gopher_repetition, good, bad, "max_duplicate_lines", 4 / 10)
    twenty, some, more = lines_of(20, 28, 29)
    good, bad = ("\n".join([twenty, some, line, twenty]) for line in (more, more[:-1]))
    assert len(good) == 100
    holds(gopher_repetition, good, bad, "max_duplicate_line_characters", 20 / 99)


def test_gopher_duplicate_paragraphs():
    threes = ["\n".join(lines_of(*[30] * 18)[start : start + 3]) for start in range(0, 18, 3)]
    good = "\n\n".join([*threes, *"qqqq"])
    bad = "\n \n\n".join([*threes[:5], *"qqqqq"])
    holds(gopher_repetition, good, bad, "max_duplicate_paragraphs", 4 / 10)
    first, second, *others = lines_of(10, 10, 13, 13, 13, 16)
    pair = f"{first}\n{second}"
    good, bad = ("\n\n".join([pair, "\n".join(others[:2]), "\n".join([others[2], last]), pair]) for last in (others[3], others[3][:-1]))
    assert len(good) == 105
    holds(partial(gopher_repetition, top_ngrams={}, duplicate_ngrams={}), good, bad, "max_duplicate_paragraph_characters", 21 / 104)


def with_ngrams(n, grams, missing):
    """300 n characters of words less the missing: `grams` (each n words of three letters, with a word between) and filling."""
    slots = len(grams)
    room = 300 * n - 3 * n * slots
    sizes = [room // slots + (slot < room % slots) for slot in range(slots)]
    sizes[0] -= missing
    filling = ["w" * (size - 3) + word for size, word in zip(sizes, different(slots, 3), strict=True)]
    return " ".join(word for gram, single in zip(grams, filling, strict=True) for word in (*gram, single))


@pytest.mark.parametrize("n", TOP_NGRAMS)
def test_gopher_top_ngrams(n):
    times = round(100 * TOP_NGRAMS[n])
    gram = ["xyz", "xzy", "yxz", "yzx"][:n]
    good, bad = (with_ngrams(n, [gram] * times, missing) for missing in (0, 1))
    holds(gopher_repetition, good, bad, f"top_ngrams.{n}", times * 3 * n / (300 * n - 1))


@pytest.mark.parametrize("n", DUPLICATE_NGRAMS)
def test_gopher_duplicate_ngrams(n):
    kinds = round(100 * DUPLICATE_NGRAMS[n])
    words = [word[::-1].upper() for word in different(kinds * n, 3)]
    grams = [words[start : start + n] for start in range(0, len(words), n)]
    good, bad = (with_ngrams(n, grams + grams, missing) for missing in (0, 1))
    holds(gopher_repetition, good, bad, f"duplicate_ngrams.{n}", kinds * 3 * n / (300 * n - 1))


def naive_shares(words, n):
    """(top, duplicate) as the docstring says, by looking at every n-gram."""
    total = sum(map(len, words))
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    most = max(map(grams.count, grams), default=0)
    top = max((len("".join(gram)) * most for gram in grams if grams.count(gram) == most), default=0) if most > 1 else 0
    inside = {start + step for start, gram in enumerate(grams) if gram in grams[:start] for step in range(n)}
    return min(1.0, top / total), sum(len(words[index]) for index in inside) / total


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), min_size=1, max_size=40))
def test_ngram_shares_are_what_looking_at_every_ngram_gives(words):
    every = dict.fromkeys(range(2, 12), 0.0)  # a limit of 0: none is left out
    found = {(rule, n): share for rule, n, share in _ngram_shares(Views(" ".join(words)), every, every)}
    for n in every:
        top, duplicate = naive_shares(words, n)
        assert found.get(("top_ngrams", n), 0.0) == pytest.approx(top)
        assert found.get(("duplicate_ngrams", n), 0.0) == pytest.approx(duplicate)


@given(st.lists(st.sampled_from([*"abcdefgh"]), min_size=1, max_size=60), st.integers(0, 30), st.integers(0, 30))
def test_stopping_early_changes_no_verdict(words, low, high):
    limits = {n: (low if n % 2 else high) / 100 for n in range(5, 9)}
    broken = [f"duplicate_ngrams.{n}" for n in limits if naive_shares(words, n)[1] > limits[n] + 1e-12]
    verdict = gopher_repetition(" ".join(words), top_ngrams={}, duplicate_ngrams=limits)
    assert (verdict.rule if isinstance(verdict, Reason) else None) == (broken[0] if broken else None)


# ---- C4 and FineWeb ----------------------------------------------------------------------------------------------------


FIVE = [f"Line number {word} ends here." for word in ("one", "two", "three", "four", "five")]


def test_c4_counts_sentences():
    good, bad = "\n".join(FIVE), "\n".join(FIVE[:4])
    holds(c4, good, bad, "min_sentences", 4)
    one_line = 'It is so. Is it? "Yes!" he said (twice.) And then 3.14 came.'
    assert c4(one_line) == one_line
    assert c4(one_line, min_sentences=6) == Reason("min_sentences", 5)
    assert c4("", min_sentences=0) == c4("no end", min_sentences=0) == Reason("min_sentences", 0)


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [
        ("It is so.", "It is so"),
        ('He said "no"', "He said no;"),
        ("It is so!", "It is so..."),
        ("Is it so?", "Is it so…"),
        ("Three words here.", "Two words."),
        ("Of " + "w" * 1000 + " here.", "Of " + "w" * 1001 + " here."),
        ("Coffee is not Java, script.", "Please enable JavaScript now."),
        ("These are terms for use.", "See our Terms of Use now."),
    ],
)
def test_c4_keeps_and_drops_lines(kept, dropped):
    assert c4("\n".join([*FIVE, kept, dropped])) == "\n".join([*FIVE, kept])
    assert c4("\n".join([dropped, *FIVE])) == "\n".join(FIVE)


def test_c4_cuts_citations_and_refuses_pages():
    assert c4("\n".join([*FIVE[:4], "  It was so.[12][edit] "])) == "\n".join([*FIVE[:4], "It was so."])
    holds(c4, "\n".join([*FIVE, "A list [x] here."]), "\n".join([*FIVE, "If x { then y."]), "forbidden", "{")
    assert c4("\n".join([*FIVE, "Here is Lorem Ipsum."])) == Reason("forbidden", "lorem ipsum")
    assert c4("\n".join([*FIVE, "if x {", "JavaScript is {} here."])) == "\n".join(FIVE)  # these lines go anyway
    assert c4("\n".join([*FIVE, "if {x} then y."]), forbidden=[]) == "\n".join([*FIVE, "if {x} then y."])


def listing(count, length=40, ends=0, words=4):
    """So many different lines of a length and of so many words, the first `ends` of which end in a full stop."""
    lines = []
    for number in range(count):
        line = " ".join([f"{number:04d}", *["w"] * (words - 2)]) + " "
        line += "v" * (length - 1 - len(line))
        lines.append(line + ("." if number < ends else "v"))
    return lines


def test_fineweb():
    holds(fineweb, "\n".join(listing(25, ends=3)), "\n".join(listing(25, ends=2)), "min_punctuated_lines", 2 / 25)
    ends = {"ends": 100, "words": 5}
    good, bad = ("\n".join(listing(67, 29, **ends) + listing(100, length, **ends)[67:]) for length in (30, 29))
    assert fineweb(good) is good
    assert fineweb(bad) == Reason("max_short_lines", 1.0)
    bad = "\n".join(listing(68, 29, **ends) + listing(100, 30, **ends)[68:])
    assert fineweb(bad) == Reason("max_short_lines", 0.68)
    lines = listing(100, 30, **ends)
    good, bad = ("\n".join([*lines[:98], "x" * length, lines[0]]) for length in (30, 29))
    holds(fineweb, good, bad, "max_duplicate_characters", 30 / 2999)
    good, bad = ("\n".join(listing(9, 40, 9, words=3) + listing(10, 40, 10, words=last)[9:]) for last in (3, 2))
    holds(fineweb, good, bad, "max_newlines", 9 / 29)
    assert fineweb("\n \n") == Reason("min_punctuated_lines", 0.0)
    hindi = "\n".join(line[:-1] + "।" for line in listing(10))
    assert fineweb(hindi) is hindi


# ---- all of them -------------------------------------------------------------------------------------------------------


def test_apply_keeps_what_it_throws_away():
    excluded = []
    texts = ["\n".join([*FIVE, "gone"]), "{ " + "x" * 300 + " y.", "\n".join(FIVE), prose(49)]
    documents = [Document(text, "source", f"file\udcff:{number}") for number, text in enumerate(texts)]
    kept = list(apply(iter(documents), [("c4", c4), ("ends", lambda text: Reason("never", 1.5) if "z" in text else text)], excluded.append))
    assert kept == [documents[0]._replace(text="\n".join(FIVE)), documents[2]]
    assert kept[1] is documents[2]
    assert excluded == [
        {"id": "file?:1", "source": "source", "filter": "c4.forbidden", "value": "{", "text": texts[1][:200]},
        {"id": "file?:3", "source": "source", "filter": "c4.min_sentences", "value": 0, "text": texts[3][:200]},
    ]
    json.dumps(excluded)


def test_apply_gives_each_filter_what_the_last_has_left():
    seen = []
    documents = [Document("\n".join([*FIVE, "gone"]), "s", "1")]
    assert next(iter(apply(documents, [("c4", c4), ("look", lambda text: seen.append(text) or text)], seen.append))).text == seen[0]
    assert seen == ["\n".join(FIVE)]
    assert list(apply(documents, [], seen.append)) == documents


TEXTS = st.text() | st.text(alphabet="ab. \n") | st.text(alphabet="-#…{[1]}\0\r\n\x85\u2028 λ名é’")
LOOSE = [
    partial(gopher_quality, min_words=0),
    partial(gopher_quality, min_words=0, min_word_length=0, min_letter_words=0, min_stop_words=0),
    partial(c4, min_sentences=0, forbidden=()),
]


@given(st.lists(TEXTS, max_size=8), st.sampled_from([*PUBLISHED, *LOOSE]))
@settings(max_examples=300)
def test_any_text_passes_or_is_told(texts, filter):
    documents = [Document(text, "s", str(number)) for number, text in enumerate(texts)]
    runs = []
    for _ in range(2):
        excluded = []
        kept = list(apply(documents, [("f", filter)], excluded.append))
        assert sorted([d.id for d in kept] + [entry["id"] for entry in excluded]) == sorted(d.id for d in documents)
        json.dumps(excluded, allow_nan=False)
        runs.append((kept, excluded))
    assert runs[0] == runs[1]
    for document in kept:
        if getattr(filter, "func", filter) is c4:
            assert document.text and all(line.endswith(C4_ENDS) for line in document.text.splitlines())
        else:
            assert document.text is texts[int(document.id)]


@pytest.mark.parametrize("unit", ["x", "ha ", "\n", "- a...\n", ". ' [1 {", "\0", "\n \n", "語"])
def test_a_long_text_takes_no_longer_than_it_must(unit):
    text = unit * (5_000_000 // len(unit))
    for filter in PUBLISHED:
        assert isinstance(filter(text), Reason) or filter is gopher_repetition
    gopher_quality(text, min_words=0, max_words=10**9, max_word_length=1e9, max_symbols=1e9, max_bullet_lines=1, max_ellipsis_lines=1)


def test_a_long_text_with_much_repetition_is_counted_in_full():
    text = " ".join(word for word in different(17_576, 3) for _ in range(12))  # 210 912 words
    assert gopher_repetition(text, duplicate_ngrams={10: 0.9}) == Reason("duplicate_ngrams.10", 11 / 12)
