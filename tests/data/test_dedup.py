"""Duplicates, near-duplicates and contamination: what has to go goes, and nothing else, whatever memory there is."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tracemalloc
import unicodedata
from hashlib import blake2b, shake_128

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pascaline.data import dedup
from pascaline.data.dedup import Contamination, Hit, decontaminate, exact, minhash, permutations, signed, words
from pascaline.data.sources import SHOWN, Document
from pascaline.errors import BadInput


def corpus(texts, source="s"):
    return [Document(text, source, f"{source}:{number}") for number, text in enumerate(texts)]


def split(generate, documents, *rest, **options):
    """(ids kept, entries told) of one of the three generators."""
    told = []
    argument = (lambda: iter(documents)) if generate is minhash else iter(documents)
    kept = list(generate(argument, *rest, told.append, **options))
    assert all(set(entry) == {"id", "source", "filter", "value", "text"} and len(entry["text"]) <= SHOWN for entry in told)
    json.dumps(told, ensure_ascii=False).encode()
    assert sorted([document.id for document in kept] + [entry["id"] for entry in told]) == sorted(d.id for d in documents)
    assert {document.id: document for document in documents} | {d.id: d for d in kept} == {d.id: d for d in documents}
    return [document.id for document in kept], told


def edited(number, seed=0):
    """Texts of which about half are copies of earlier ones with some words changed; some are short or without a word."""
    draw = random.Random(seed)
    texts = []
    for _ in range(number):
        if texts and draw.random() < 0.5:
            found = draw.choice(texts).split(" ")
            for _ in range(draw.randrange(4)):
                found[draw.randrange(len(found))] = f"x{draw.randrange(1000)}"
            texts.append(" ".join(found))
        else:
            texts.append(" ".join(f"w{draw.randrange(1000)}" for _ in range(draw.choice([0, 1, 2, 3, 4, 5, 6, 20, 40, 40, 60]))))
    return texts


# exact


def plain(text):
    """What `exact` promises to compare, said in other words."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


@given(st.lists(st.tuples(st.text("aA .\n\t\u00a0e\u0301\u00e9", max_size=4), st.sampled_from("pq")), max_size=12))
@example([("caf\u00e9 A", "p"), ("cafe\u0301 a", "p"), ("\ncafe\u0301\u00a0\tA", "q"), ("cafe A", "q")])
def test_exact_keeps_the_first_of_equal_normalised_texts(rows):
    documents = [Document(text, source, f"d{number}") for number, (text, source) in enumerate(rows)]
    kept, told = split(exact, documents)
    first = [next(other for other in documents if plain(other.text) == plain(document.text)) for document in documents]
    assert kept == [document.id for document, other in zip(documents, first, strict=True) if other is document]
    assert [(entry["id"], entry["filter"], entry["value"]) for entry in told] == [
        (document.id, "duplicate", {"id": other.id, "source": other.source})
        for document, other in zip(documents, first, strict=True)
        if other is not document
    ]


def test_exact_names_the_first_through_a_growing_table(monkeypatch):
    monkeypatch.setattr(dedup, "REBUILD", 300)
    once = [f"text {number}" for number in range(5000)]
    kept, told = split(exact, corpus(once, "a/é") + corpus([f"  {text}\n" for text in once], "b"))
    assert kept == [f"a/é:{number}" for number in range(5000)]
    assert [entry["value"] for entry in told] == [{"id": f"a/é:{number}", "source": "a/é"} for number in range(5000)]


@pytest.mark.parametrize("same", ["low", "high"])
def test_the_table_compares_all_128_bits(same):
    kept = dedup.Kept()
    constant = (123).to_bytes(8, "little")
    others = [(number << 32).to_bytes(8, "little") for number in range(700)]  # all begin to look at the same place
    digests = [other + constant if same == "high" else constant + other for other in others]
    for number, digest in enumerate(digests[:600]):
        assert kept.first(digest, Document("", "s", str(number))) is None
    assert [kept.first(digest, Document("", "t", "again"))["id"] for digest in digests[:600]] == [str(n) for n in range(600)]
    assert kept.first(digests[699], Document("", "t", "new")) is None


def test_exact_streams():
    endless = (Document(f"{number}", "s", f"{number}") for number in itertools.count())
    assert [document.id for document in itertools.islice(exact(endless, print), 3)] == ["0", "1", "2"]


def test_half_a_character_stops_nobody(tmp_path):
    documents = [Document("a \ud800 b", "s", "one\udcff"), Document("a  \ud800 b", "s", "two\udcff")]
    for generate, rest in [(exact, ()), (minhash, (tmp_path,)), (decontaminate, (Contamination([("e", "a b")]),))]:
        told = []
        list(generate((lambda: documents) if generate is minhash else documents, *rest, told.append))
        assert [entry["id"] for entry in told][-1:] == ["two?"]
        json.dumps(told, ensure_ascii=False).encode()


# words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        (" -- !? _ ", []),
        ("Don't stop_here: 3.14!", ["don", "t", "stop", "here", "3", "14"]),
        ("CAFE\u0301 caf\u00e9", ["café", "café"]),
        ("Straße\u00a0ÉTÉ — “Ja”", ["straße", "été", "ja"]),
        ("我们 2 つabc的", ["我", "们", "2", "つ", "abc", "的"]),
    ],
)
def test_words(text, found):
    assert words(text) == found


@given(st.text(st.characters(max_codepoint=127)))
def test_the_quick_way_for_ascii_gives_the_same_words(text):
    assert words(text) == words(f"{text} é")[:-1] == re.findall("[a-z0-9]+", text.lower())


# minhash: signatures


def reference(text, seed):
    """The signature in Python's unbounded integers."""
    found = words(text)
    found += [""] * (5 - len(found))
    hashes = [int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little") for word in found]
    grams = set()
    for start in range(len(hashes) - 4):
        value = 0
        for word in hashes[start : start + 5]:
            value = (value * 0x9E3779B97F4A7C15 + word) % 2**64
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            value = (value ^ value >> 33) * factor % 2**64
        grams.add((value ^ value >> 33) >> 32)
    drawn = shake_128(f"minhash {seed}".encode()).digest(16 * 112)
    numbers = [int.from_bytes(drawn[start : start + 8], "little") for start in range(0, len(drawn), 8)]
    return [min((a * gram + b) % 2**64 >> 32 for gram in grams) for a, b in zip(numbers[:112], numbers[112:], strict=True)]


def signatures(texts, seed=0, memory_bytes=dedup.MEMORY):
    """uint64 [texts, 112]; zeros for a text without a word."""
    parts = []
    for batch, hashes, lengths in dedup._batches(corpus(texts), memory_bytes, 5):
        rows = np.zeros((len(batch), 112), np.uint64)
        rows[lengths > 0] = signed(hashes, lengths[lengths > 0], *permutations(seed)).T
        parts.append(rows)
    return np.concatenate(parts)


@pytest.mark.parametrize("seed", [0, 7])
def test_signatures_are_exact_and_the_batch_does_not_matter(seed):
    texts = [text for text in edited(60, seed) if text] + ["Ünï cödé", "a a a a a a a a", "我们在这里吃饭"]
    expected = [reference(text, seed) for text in texts]
    assert signatures(texts, seed).tolist() == expected
    assert signatures(texts, seed, 1 << 14).tolist() == expected
    assert signatures(texts, seed, 1).tolist() == expected


def test_another_seed_gives_other_permutations():
    a, b = permutations(0)
    others = permutations(1)
    assert len({*a.tolist(), *b.tolist()}) == 224
    assert not {*a.tolist(), *b.tolist()} & {*others[0].tolist(), *others[1].tolist()}


def tail(count, of, chance):
    """The chance of a count this far out on its side, if it is binomial."""
    log = [
        math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1) + k * math.log(chance) + (of - k) * math.log1p(-chance)
        for k in range(of + 1)
    ]
    return min(sum(map(math.exp, log[: count + 1])), sum(map(math.exp, log[count:])))


PAIRS = 400
SHARED = (60, 67, 75, 82, 86, 89, 95)  # of 100 5-grams in each of the two texts of a pair: similarities 0.43 to 0.90


@pytest.fixture(scope="module")
def pairs():
    """(similarity, texts) for each of SHARED: PAIRS pairs, one after the other, that begin with the same words."""
    fresh = (f"w{number}" for number in itertools.count())
    groups = []
    for shared in SHARED:
        texts = []
        for _ in range(PAIRS):
            same = list(itertools.islice(fresh, shared + 4))
            texts += [" ".join(same + list(itertools.islice(fresh, 100 - shared))) for _ in range(2)]
        sets = [{tuple(text.split()[i : i + 5]) for i in range(100)} for text in texts[:2]]
        groups.append((len(sets[0] & sets[1]) / len(sets[0] | sets[1]), texts))
    return groups


def test_the_share_of_equal_minima_is_the_similarity(pairs):
    for similarity, texts in pairs:
        rows = signatures(texts)
        equal = int((rows[::2] == rows[1::2]).sum())
        assert tail(equal, 112 * PAIRS, similarity) > 1e-4, (similarity, equal / (112 * PAIRS))


def test_pairs_are_found_as_often_as_the_formula_says(pairs, tmp_path):
    documents = [document for similarity, texts in pairs for document in corpus(texts, f"{similarity}")]
    _, told = split(minhash, documents, tmp_path, seed=3)
    for similarity, texts in pairs:
        mine = [entry for entry in told if entry["source"] == f"{similarity}"]
        rows = signatures(texts, 3).reshape(PAIRS, 2, 14, 8)
        assert len(mine) == (rows[:, 0] == rows[:, 1]).all(2).any(1).sum()
        chance = 1 - (1 - similarity**8) ** 14
        assert tail(len(mine), PAIRS, chance) > 1e-4, (similarity, len(mine) / PAIRS, chance)
        for entry in mine:  # only ever the other one of the pair
            number = int(entry["id"].split(":")[1])
            assert number % 2
            assert (entry["value"]["id"], entry["value"]["source"]) == (f"{similarity}:{number - 1}", f"{similarity}")


# minhash: clusters


def clusters(texts, seed):
    """Lowest number of each text's cluster, by comparing all bands of all pairs."""
    rows = signatures(texts, seed).reshape(len(texts), 14, 8)
    lowest = list(range(len(texts)))
    for a, b in itertools.combinations([number for number, text in enumerate(texts) if words(text)], 2):
        if (rows[a] == rows[b]).all(1).any() and lowest[a] != lowest[b]:
            low, high = sorted((lowest[a], lowest[b]))
            lowest = [low if number == high else number for number in lowest]
    return lowest


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 100))
def test_clusters_are_those_of_all_pairs(tmp_path_factory, texts_seed, seed):
    texts = edited(80, texts_seed)
    lowest = clusters(texts, seed)
    rows = signatures(texts, seed)
    expected = [
        (f"s:{number}", {"id": f"s:{low}", "source": "s", "similarity": round(float((rows[number] == rows[low]).mean()), 4)})
        for number, low in enumerate(lowest)
        if number != low
    ]
    assert expected
    kept, told = split(minhash, corpus(texts), tmp_path_factory.mktemp("m"), seed=seed)
    assert [(entry["id"], entry["value"]) for entry in told] == expected
    assert {entry["filter"] for entry in told} == {"near-duplicate"}
    assert kept == [f"s:{number}" for number, low in enumerate(lowest) if number == low]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40), st.integers(1, 8))
def test_union_of_pairs_in_any_portions(joined, portion):
    parents = np.arange(31)
    for start in range(0, len(joined), portion):
        a, b = np.array(joined[start : start + portion]).T
        dedup._join(parents, a, b)
    lowest = list(range(31))
    for a, b in joined:
        low, high = sorted((lowest[a], lowest[b]))
        lowest = [low if number == high else number for number in lowest]
    assert dedup._roots(parents, np.arange(31)).tolist() == lowest == parents.tolist()


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(2, 20))
def test_pairs_of_equal_keys_in_any_memory(tmp_path_factory, keys, capacity):
    records = np.array([(key * 0x9E3779B97F4A7C15 % 2**64, number) for number, key in enumerate(keys)], dedup.RECORD)
    path = tmp_path_factory.mktemp("p") / "bucket"
    path.write_bytes(records.tobytes())
    found = sorted((int(b), int(a)) for first, other in dedup._pairs(path, capacity) for a, b in zip(first, other, strict=True))
    assert found == [(number, keys.index(key)) for number, key in enumerate(keys) if keys.index(key) < number]


def chain():
    """40 windows of 204 words, each 8 words after the one before: neighbours are alike, the ends share nothing."""
    row = [f"w{number}" for number in range(8 * 39 + 204)]
    return [" ".join(row[8 * number : 8 * number + 204]) for number in range(40)]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_chain_of_near_duplicates_is_one_cluster(tmp_path, order):
    texts = chain()
    random.Random(order).shuffle(texts)
    kept, told = split(minhash, corpus(texts), tmp_path)
    assert kept == ["s:0"]
    assert {entry["value"]["id"] for entry in told} == {"s:0"}
    assert min(entry["value"]["similarity"] for entry in told) < 0.5 < max(entry["value"]["similarity"] for entry in told)


def test_near_duplicates_across_sources(tmp_path):
    text = " ".join(f"w{number}" for number in range(100))
    documents = [
        Document(text, "a", "x"),
        Document("something else altogether, five words", "b", "y"),
        Document(text + "!", "b", "z\ud800"),
    ]
    told = []
    assert list(minhash(lambda: documents, tmp_path, told.append)) == documents[:2]
    assert [(e["source"], e["value"]) for e in told] == [("b", {"id": "x", "source": "a", "similarity": 1.0})]
    told.clear()
    assert list(minhash(lambda: documents[::-1], tmp_path, told.append)) == documents[:0:-1]
    assert told[0]["value"] == {"id": "z?", "source": "b", "similarity": 1.0}


def test_short_documents(tmp_path):
    texts = [
        "Yes.",
        "",
        "no",
        "yes",
        "!!!",
        "one two three four",
        "...",
        "One, two, three, four!",
        "one two three four five",
        "two one three four",
    ]
    kept, told = split(minhash, corpus(texts), tmp_path)
    assert [(entry["id"], entry["value"]["id"], entry["value"]["similarity"]) for entry in told] == [
        ("s:3", "s:0", 1.0),
        ("s:7", "s:5", 1.0),
    ]
    assert len(kept) == 8


@pytest.mark.parametrize("texts", [[], [""], ["", " ", "!"]])
def test_nothing_to_compare(tmp_path, texts):
    assert split(minhash, corpus(texts), tmp_path) == ([f"s:{number}" for number in range(len(texts))], [])


# minhash: memory, files


def test_any_memory_gives_the_same(tmp_path, monkeypatch):
    """At 8 KiB a bucket is read many times in parts of 16 records; nearly half of all documents are the same."""
    texts = edited(400) + ["the same five words always"] * 300
    random.Random(1).shuffle(texts)
    expected = split(minhash, corpus(texts), tmp_path)
    assert len(expected[1]) > 350
    monkeypatch.setattr(dedup, "LEAST_MEMORY", 1)
    for memory_bytes in (1 << 13, 50_000, 1 << 20):
        assert split(minhash, corpus(texts), tmp_path, memory_bytes=memory_bytes) == expected


def lazy(number):
    """Documents of few different words, none of them a near-duplicate, made as they are asked for."""
    draw = random.Random(5)
    return (Document(" ".join(draw.choices(VOCABULARY, k=20)), "s", f"{n}") for n in range(number))


VOCABULARY = [f"w{number}" for number in range(200)]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(number):
        tracemalloc.start()
        try:
            count = sum(1 for _ in minhash(lambda: lazy(number), tmp_path, lambda entry: None, memory_bytes=1 << 16))
            assert count == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # the words' hashes are remembered
    few, many = peak(1000), peak(4000)
    assert many - few < 1 << 16  # the signatures alone are 1.3 MB more, the records 0.7 MB


def test_grouping_keeps_to_its_memory(tmp_path, monkeypatch):
    sorted_at_once = []
    argsort = np.argsort

    def spy(values, **options):
        sorted_at_once.append(len(values))
        return argsort(values, **options)

    place = tmp_path / "files"
    place.mkdir()
    assert dedup._write(lazy(4000), place, 0, 1 << 16) == 4000
    largest = max((place / name).stat().st_size // 16 for name in dedup.BUCKETS)
    assert largest > 400
    monkeypatch.setattr(np, "argsort", spy)
    dedup._clustered(4000, place, 1 << 16)
    assert 128 < max(sorted_at_once) < 1.25 * 256  # 64 KiB, 256 bytes for each record


@pytest.mark.parametrize("stop", ["end", "close", "excluded", "first", "second"])
def test_the_folder_is_left_empty(tmp_path, stop):
    documents = corpus(["a b c d e f"] * 3 + ["g h i j k l"])
    readings = []

    def read():
        readings.append(0)
        yield documents[0]
        if stop == ["first", "second"][len(readings) - 1]:
            raise OSError("gone")
        yield from documents[1:]

    def told(entry):
        if stop == "excluded":
            raise OSError("full")

    folder = tmp_path / "new" / "folder"
    found = minhash(read, folder, told)
    if stop == "close":
        assert next(found) == documents[0]
        assert len(os.listdir(folder)) == 1
        found.close()
    elif stop == "end":
        assert len(list(found)) == 2
    else:
        with pytest.raises(OSError, match=r"gone|full"):
            list(found)
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "second",
    [["one", "two"], ["one", "two", "three", "four"], ["one", "TWO", "three"], ["two", "one", "three"], []],
    ids=["fewer", "more", "changed", "swapped", "none"],
)
def test_documents_that_change_between_the_readings(tmp_path, second):
    readings = iter([corpus(["one", "two", "three"]), corpus(second)])
    with pytest.raises(BadInput, match="second reading"):
        list(minhash(lambda: next(readings), tmp_path, print))
    assert os.listdir(tmp_path) == []


SCRIPT = """
import json, sys
from pascaline.data.dedup import Contamination, decontaminate, minhash
from pascaline.data.sources import Document

folder, evaluation, *texts = json.load(sys.stdin)
documents, told = [Document(text, "s", f"s:{number}") for number, text in enumerate(texts)], []
list(minhash(lambda: documents, folder, told.append, seed=5))
list(decontaminate(documents, Contamination([("e", evaluation)]), told.append))
print(json.dumps(told))
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_says_the_same(tmp_path, hash_seed):
    texts = edited(150, 2)
    evaluation = next(text for text in texts if len(words(text)) > 13)
    message = json.dumps([str(tmp_path), evaluation, *texts])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", SCRIPT], input=message, capture_output=True, text=True, check=True, env=environment)
    mine = split(minhash, corpus(texts), tmp_path, seed=5)[1]
    mine += split(decontaminate, corpus(texts), Contamination([("e", evaluation)]))[1]
    assert len(mine) > 20
    assert json.loads(run.stdout) == mine


# decontamination


def first_hit(evaluations, text, n):
    """The Hit, by comparing all n-grams with all."""
    found = re.findall("[a-z0-9]+", text.lower())
    theirs = [(name, re.findall("[a-z0-9]+", evaluation.lower())) for name, evaluation in evaluations]
    ngrams = [(name, min(n, len(row)), {tuple(row[i : i + n]) for i in range(max(1, len(row) - n + 1))}) for name, row in theirs if row]
    for place in range(len(found)):
        for size in range(1, n + 1):
            for name, its, grams in ngrams:
                if its == size and tuple(found[place : place + size]) in grams:
                    mine = {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}
                    return Hit(name, " ".join(found[place : place + size]), round(len(grams & mine) / len(grams), 4))
    return None


TEXT = st.lists(st.sampled_from(["a", "B", "c."]), max_size=24).map(" ".join)
LONG = st.lists(st.sampled_from(["a", "B", "c."]), min_size=5, max_size=24).map(" ".join)


@settings(deadline=None)
@given(st.lists(LONG, min_size=1, max_size=4), st.lists(TEXT, max_size=8), st.integers(8, 10))
def test_contamination_is_what_comparing_everything_finds(evaluations, texts, n):
    named = [(f"e{number}", text) for number, text in enumerate(evaluations)]
    contamination = Contamination(named, n)
    expected = [first_hit(named, text, n) for text in texts]
    assert [contamination.hits(text) for text in texts] == expected
    kept, told = split(decontaminate, corpus(texts), contamination)
    assert kept == [f"s:{number}" for number, hit in enumerate(expected) if hit is None]
    assert [(entry["filter"], entry["value"]) for entry in told] == [("contamination", hit._asdict()) for hit in expected if hit]


SENTENCE = "The quick brown fox, it is said, jumps over the lazy dog at noon every single day."


@pytest.mark.parametrize(
    ("text", "ngram"),
    [
        (
            "He wrote: THE QUICK brown fox it is said jumps over the lazy dog AT midnight",
            "the quick brown fox it is said jumps over the lazy dog at",
        ),
        ("He wrote: THE QUICK brown fox it is said jumps over the lazy dog", None),  # 12 words
        ("brown fox-it is\nsaid/jumps over 'the' lazy dog (at noon) every", "brown fox it is said jumps over the lazy dog at noon every"),
        ("quick the brown fox it is said jumps over the lazy dog at", None),
    ],
)
def test_thirteen_words_in_a_row(text, ngram):
    contamination = Contamination([("other", "x " * 20), ("fox", SENTENCE)])
    hit = contamination.hits(text)
    assert (hit and (hit.evaluation, hit.ngram, hit.share)) == (ngram and ("fox", ngram, 0.2))  # of 5 n-grams


def test_a_short_evaluation_text_is_found_whole():
    contamination = Contamination([("long", SENTENCE), ("short", "What is two plus two?"), ("none", "?")])
    assert contamination.hits("He asked what is TWO plus two") == Hit("short", "what is two plus two", 1.0)
    assert contamination.hits("He asked what is two plus three") is None
    assert contamination.hits(SENTENCE) == Hit("long", "the quick brown fox it is said jumps over the lazy dog at", 1.0)


def test_an_ngram_does_not_reach_from_document_to_document():
    found = words(SENTENCE)
    texts = [" ".join(found[:8]), " ".join(found[8:]), "", SENTENCE, " ".join(found[:8])]
    kept, told = split(decontaminate, corpus(texts), Contamination([("fox", SENTENCE)]))
    assert (kept, [entry["id"] for entry in told]) == (["s:0", "s:1", "s:2", "s:4"], ["s:3"])


def test_unicode_contamination():
    text = "Où est l'été à Zürich où les élèves dînent près de Noël chaque année"
    contamination = Contamination([("french", text), ("han", "小明有五个苹果他又买了三个一共有几个")])
    assert contamination.hits(unicodedata.normalize("NFD", text).upper()).evaluation == "french"
    assert contamination.hits("问题:小明有五个苹果,他又买了三个。").ngram == " ".join("小明有五个苹果他又买了三个")
    assert contamination.hits("小明有五个苹果,我又买了三个,一共有几个") is None


def test_a_hash_alone_is_no_match(monkeypatch):
    monkeypatch.setattr(dedup, "_word", lambda word: 1)
    contamination = Contamination([("e", "a b c d e f g h")], 8)
    assert contamination.hits("q r s t u v w x y") is None
    assert contamination.hits("q a b c d e f g h").ngram == "a b c d e f g h"


@pytest.mark.parametrize("n", [7, 51])
def test_too_short_or_long_ngrams(n):
    with pytest.raises(BadInput, match=f"n is {n}; .* 8 to 50"):
        Contamination([("e", SENTENCE)], n)


def test_no_evaluation_text_is_an_error():
    with pytest.raises(BadInput, match="no evaluation text"):
        Contamination([("e", "?!")])
