"""Sources by weight: the shares that come out of cleaning are those asked for, or it is said which are not."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.data import parallel
from pascaline.data.build import cleaned
from pascaline.data.filters import Reason
from pascaline.data.mixture import Share, Spool, missing, wanted
from pascaline.data.quality import runs
from pascaline.data.sources import Document
from pascaline.tables import Corpus

BAD = "m" * 300  # what the filter `runs` throws away


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def texts(name: str, number: int, length: int = 100) -> list[str]:
    """Different texts of so many bytes, of which every other one is bad."""
    good = [(f"{name} {n} " + " ".join(f"w{n * 7 + i}" for i in range(40)))[:length] for n in range(number)]
    return [text for pair in zip(good, [BAD] * number, strict=True) for text in pair]


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """A source of 20,000 good bytes and one of 2,000."""
    return write(tmp_path / "large.jsonl", texts("large", 200)), write(tmp_path / "small.jsonl", texts("small", 20))


def mix(corpus: Corpus, scratch: Path, seed: int = 1, told: list[Any] | None = None) -> tuple[list[Document], dict[str, Share]]:
    shares: dict[str, Share] = {}
    excluded = [].append if told is None else told.append
    found = list(cleaned(corpus, excluded, scratch / "scratch", seed=seed, shares=shares))
    assert not list((scratch / "scratch").iterdir())
    return found, shares


def sizes(found: list[Document]) -> Counter[str]:
    counted = Counter[str]()
    for document in found:
        counted[document.source] += len(document.text.encode())
    return counted


def test_shares_are_those_of_the_weights_whatever_cleaning_takes(two: tuple[str, str], tmp_path: Path) -> None:
    large, small = two
    corpus = Corpus(sources=[large, small], max_bytes=4000, mixture={large: 3.0}, filters={"runs": {}}, dedup="exact")
    assert wanted(corpus) == {large: 0.75, small: 0.25}
    found, shares = mix(corpus, tmp_path)
    assert sizes(found) == {large: 3000, small: 1000}
    assert shares == {large: Share(3000, 3000), small: Share(1000, 1000)} and not missing(corpus, shares)
    assert len({(d.source, d.id) for d in found}) == len(found)  # nothing twice
    for upto in range(8, len(found)):  # any part is mixed alike
        part = sizes(found[:upto])
        assert abs(part[large] - 3 * part[small]) <= 400
    assert wanted(Corpus(sources=["a", "b"], mixture={"a": 1e308, "b": 1e308})) == {"a": 0.5, "b": 0.5}


def test_a_small_source_is_repeated_as_far_as_allowed_and_the_rest_is_missing(two: tuple[str, str], tmp_path: Path) -> None:
    large, small = two
    plan = {"sources": [large, small], "max_bytes": 20_000, "mixture": {large: 1.0, small: 1.0}, "filters": {"runs": {}}}
    for most, times in ((1.0, {1}), (2.5, {2, 3}), (4.0, {4}), (8.0, {5})):
        corpus = Corpus(**plan, max_repeats=most)
        found, shares = mix(corpus, tmp_path)
        have = min(10_000, int(2000 * most))
        assert sizes(found) == {large: 10_000, small: have} and shares[small] == Share(10_000, 2000)
        assert set(Counter(d.id for d in found if d.source == small).values()) == times
        assert set(Counter(d.id for d in found if d.source == large).values()) == {1}
        assert [small in line and f"{have:,} of the 10,000" in line for line in missing(corpus, shares)] == [True] * (have < 10_000)


def test_the_seed_decides_the_order_of_repeats_and_nothing_else(two: tuple[str, str], tmp_path: Path) -> None:
    large, small = two
    corpus = Corpus(sources=[large, small], max_bytes=20_000, mixture={small: 1.0}, max_repeats=2.5, filters={"runs": {}})
    first, again, other = (mix(corpus, tmp_path, seed)[0] for seed in (1, 1, 2))
    assert first == again != other
    assert [d for d in first if d.source == large] == [d for d in other if d.source == large]
    some, more = ([d.id for d in found if d.source == small] for found in (first, other))
    assert some[:20] == more[:20] == sorted(set(some), key=some.index) and sorted(some[20:40]) == sorted(some[:20]) != some[20:40]
    assert some[40:] != more[40:]  # half of the documents a third time, not always the same half


def test_processes_do_not_change_a_mixture(two: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = two
    monkeypatch.setattr(parallel, "ALONE", 500)
    monkeypatch.setattr(parallel, "CHUNK", 1000)
    plan = Corpus(sources=[large, small], max_bytes=9000, mixture={large: 2}, max_repeats=2, filters={"runs": {}})
    for dedup in ("exact", "minhash"):
        results = []
        for processes in (1, 2):
            told: list[Any] = []
            corpus = plan.model_copy(update={"dedup": dedup, "processes": processes})
            results.append((mix(corpus, tmp_path, told=told), told))
        assert results[0] == results[1] and len(results[0][1]) >= 60


def test_a_text_of_two_sources_counts_for_the_first_and_the_second_gives_another(tmp_path: Path) -> None:
    shared = [text for text in texts("shared", 10) if text != BAD]
    one = write(tmp_path / "one.jsonl", shared)
    two = write(tmp_path / "two.jsonl", shared[:5] + [text for text in texts("two", 10) if text != BAD])
    corpus = Corpus(sources=[one, two], max_bytes=2000, mixture={one: 1.0}, dedup="exact")
    found, shares = mix(corpus, tmp_path)
    assert sizes(found) == {one: 1000, two: 1000} and shares[two] == Share(1000, 1000)
    assert len({d.text for d in found}) == 20


def test_more_is_read_in_place_of_near_copies(tmp_path: Path) -> None:
    good, others = ([" ".join(f"{letter}{n * 50 + i}" for i in range(40)) for n in range(40)] for letter in "wv")
    spoiled = [text for n, text in enumerate(good) for text in [text] + [f"{text} again{i}" for i in range(5 if n < 20 else 0)]]
    one = write(tmp_path / "one.jsonl", spoiled)
    two = write(tmp_path / "two.jsonl", [f"{text} other" for text in good[:3]] + others)
    size = 20 * min(len(text) for text in good)
    corpus = Corpus(sources=[one, two], max_bytes=2 * size, mixture={one: 1.0}, dedup="minhash")
    told: list[Any] = []
    found, shares = mix(corpus, tmp_path, told=told)
    assert sizes(found) == {one: size, two: size} and not missing(corpus, shares)
    assert {entry["filter"] for entry in told} == {"near-duplicate"}
    assert len(told) == len({(entry["source"], entry["id"]) for entry in told}) > 60  # each is told once, however often it was looked at
    assert Counter(entry["source"] for entry in told)[two] == 3
    firsts = [d.text for d in found if d.source == one]
    assert firsts[:-1] == good[: len(firsts) - 1]


def test_what_there_is_no_room_for_shadows_nothing(tmp_path: Path) -> None:
    """Looking for evaluation texts reads ahead; a copy of what was read and not taken may still come from another source."""
    shared = [text for text in texts("shared", 10) if text != BAD]
    question = "a question that nobody has ever asked before in any of all these texts"
    one, two = write(tmp_path / "one.jsonl", [question, *shared]), write(tmp_path / "two.jsonl", shared)
    exam = write(tmp_path / "exam.jsonl", [question])
    corpus = Corpus(sources=[one, two], max_bytes=1000, mixture={one: 1.0}, dedup="exact", decontaminate=[exam])
    found, shares = mix(corpus, tmp_path)
    assert sizes(found) == {one: 500, two: 500} and not missing(corpus, shares)
    assert sorted(d.text for d in found) == shared


def test_a_source_of_which_nothing_is_left_is_missing(two: tuple[str, str], tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [BAD] * 5)
    corpus = Corpus(sources=[bad, two[0]], max_bytes=1000, mixture={bad: 1.0}, max_repeats=4.0, filters={"runs": {}})
    found, shares = mix(corpus, tmp_path)
    assert sizes(found) == {two[0]: 500} and shares[bad] == Share(500, 0)
    assert len(missing(corpus, shares)) == 1


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=4),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4),
    budget=st.integers(1, 1500),
    most=st.floats(1, 5),
)
def test_shares_hold_for_any_sources(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], weights: list[float], budget: int, most: float
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    sources = [write(folder / f"{n}.jsonl", ["é" * length for length in row]) for n, row in enumerate(lengths)]
    mixture = dict(zip(sources, weights, strict=False))
    corpus = Corpus(sources=sources, max_bytes=budget, mixture=mixture, max_repeats=most)
    found, _ = mix(corpus, folder)
    counted = sizes(found)
    for source, row in zip(sources, lengths, strict=True):
        due = min(int(budget * wanted(corpus)[source]), int(2 * sum(row) * most))
        assert due - 2 < counted[source] <= due  # never half a character
        assert max(Counter(d.id for d in found if d.source == source).values(), default=0) <= most + 1
    assert all(set(d.text) == {"é"} for d in found)


def test_a_spool_finds_again_what_was_put_there(tmp_path: Path) -> None:
    put = [Document("a\nb é" * n, "s", f"x:{n}") for n in range(50)]
    with Spool(tmp_path / "deep" / "spool.jsonl") as spool:
        places = [spool.add(document) for document in put]
        seen: Iterator[tuple[Document, int]] = ((document, spool.place) for document in spool.read())
        assert list(seen) == list(zip(put, places, strict=True))
        assert [spool.load(place) for place in reversed(places)] == put[::-1]
    assert not list((tmp_path / "deep").iterdir())


def test_the_filter_of_these_tests_filters() -> None:
    assert isinstance(runs(BAD), Reason) and all(runs(text) is text for text in texts("large", 20)[::2])
