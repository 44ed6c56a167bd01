"""A spoiled corpus through everything at once: what is kept, what is not, and why."""

import json
import random
from pathlib import Path

import pytest

from pascaline.data.build import FILTERS, chosen, cleaned
from pascaline.data.filters import Reason
from pascaline.tables import Corpus

NOUNS = ["river", "engine", "garden", "letter", "winter", "market", "teacher", "bridge", "window", "captain", "library", "mountain",
         "kitchen", "orchard", "signal", "harbour"]  # fmt: skip
VERBS = ["carries", "follows", "remembers", "repairs", "watches", "crosses", "paints", "measures", "borrows", "forgets", "answers",
         "builds", "gathers", "studies"]  # fmt: skip


def prose(seed: int, sentences: int = 12) -> str:
    """English enough for every filter; two seeds share next to no 5-gram."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        a, b, c, d = (draw.choice(NOUNS) for _ in range(4))
        middle = f"the {draw.choice(NOUNS)} that {draw.choice(VERBS)} a {c} with {draw.randint(2, 99)} of the"
        lines.append(f"The {a} {draw.choice(VERBS)} {middle} {b} and will be {draw.choice(VERBS)} to the {d}.")
    return "\n".join(lines)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def spoiled(tmp_path: Path) -> tuple[Corpus, list[str]]:
    """A corpus with one of each evil, and the reason for which each line has to go ("" for those that stay)."""
    exam = "Question: how many bridges does the captain paint when the harbour measures nine rivers before winter?"
    near = prose(2).replace("The ", "A ", 1)
    rows = [
        (prose(1), ""),
        (prose(2), ""),
        (prose(1).replace("\n", " \n "), "duplicate"),
        (near, "near-duplicate"),
        (prose(3) + "\n" + exam, "contamination"),
        ("m" * 4000, "gopher_quality.min_words"),
        (prose(4) + "\n" + "market bridge " * 100, "runs.max_repetition"),
        (prose(5) + "\nAs an AI language model, I cannot cross the river.", "identity.max_mentions"),
        ("Река несёт письмо через мост. " * 30, "gopher_quality.min_stop_words"),
        (prose(6), ""),
    ]
    exams = write(tmp_path / "exam.jsonl", [exam])
    tables = {"gopher_quality": {}, "runs": {}, "identity": {}, "script": {"scripts": ["latin"]}}
    source = write(tmp_path / "web.jsonl", [text for text, _ in rows])
    return Corpus(sources=[source], filters=tables, dedup="minhash", decontaminate=[exams]), [why for _, why in rows]


def test_each_evil_is_named_and_nothing_is_lost(spoiled: tuple[Corpus, list[str]], tmp_path: Path) -> None:
    corpus, reasons = spoiled
    excluded: list[dict[str, object]] = []
    kept = list(cleaned(corpus, excluded.append, tmp_path / "scratch"))
    place = {f"web.jsonl:{number}": why for number, why in enumerate(reasons, 1)}
    assert {e["id"]: e["filter"] for e in excluded} == {name: why for name, why in place.items() if why}
    assert [d.id for d in kept] == [name for name, why in place.items() if not why]
    assert len(excluded) + len(kept) == len(reasons)  # each once, although near-deduplication reads twice
    assert kept[0].text == prose(1)
    first = next(e["value"] for e in excluded if e["filter"] == "duplicate")
    assert first == {"id": "web.jsonl:1", "source": corpus.sources[0]}
    assert all(json.dumps(e) for e in excluded)
    assert not list((tmp_path / "scratch").iterdir())


def test_less_is_asked_less_goes(spoiled: tuple[Corpus, list[str]], tmp_path: Path) -> None:
    corpus, reasons = spoiled
    for dedup, gone in (("none", set()), ("exact", {"duplicate"})):
        some: list[dict[str, object]] = []
        plain = corpus.model_copy(update={"dedup": dedup, "filters": {}, "decontaminate": []})
        assert len(list(cleaned(plain, some.append, tmp_path / "scratch"))) + len(some) == len(reasons)
        assert {e["filter"] for e in some} == gone
    assert not (tmp_path / "scratch").exists()


def test_thresholds_are_the_recipes() -> None:
    tables = {"gopher_repetition": {"top_ngrams": {"2": 0.0}}, "gopher_quality": {"min_words": 10_000}, "script": {"scripts": ["cyrillic"]}}
    filters = chosen(tables)
    assert [name for name, _ in filters] == list(tables)  # in their order
    text = prose(1)
    verdicts = [passes(text) for _, passes in filters]
    assert [v.rule for v in verdicts if isinstance(v, Reason)] == ["top_ngrams.2", "min_words", "min_share"]
    passing = [name for name in FILTERS if name not in ("quality", "gopher_repetition")]  # few words make many "of the"
    assert all(passes(text) is text for _, passes in chosen({name: {} for name in passing}))


def test_a_learned_score_learns_from_the_two_samples(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", [prose(seed) for seed in range(30)])
    bad = write(tmp_path / "bad.jsonl", [f"click here {n} buy now cheap {n} offer login cart" * 5 for n in range(30)])
    ((_, passes),) = chosen({"quality": {"good": [good], "bad": [bad]}})
    assert passes(prose(99)) == prose(99)
    verdict = passes("click here buy now cheap offer")
    assert isinstance(verdict, Reason) and verdict.rule == "min_score" and float(verdict.value) < 0.5
