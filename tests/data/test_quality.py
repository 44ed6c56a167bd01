"""Our own filters break just past their thresholds and not on the nearest innocent text; the learned score learns."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pascaline.data.filters import Reason
from pascaline.data.quality import FEATURES, QualityScore, identity, runs, script
from pascaline.errors import BadInput


def filling(size, seed=0):
    """So many letters from a to m in which nothing repeats for long."""
    return "".join(random.Random(seed).choices("abcdefghijklm", k=size))


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_runs_of_one_character():
    good, bad = (f"{filling(1000)}{'y' * length}{filling(1000, 1)}" for length in (200, 201))
    assert runs(good) is good
    assert runs(bad) == Reason("max_run", 201)
    assert runs("y" * 201) == Reason("max_run", 201)
    assert runs("y" * 150) == Reason("max_repetition", 1.0)
    spaced = filling(500) + " " * 5000 + filling(500, 1)
    assert runs(spaced) is spaced


@pytest.mark.parametrize("unit", ["y", "yz", "yo ", "no, so, ", "xyz-xyz-z"])
def test_runs_of_a_unit(unit):
    good, bad = (f"{filling(800)}{(unit * 401)[:length]}{filling(1200 - length, 1)}" for length in (400, 401))
    assert runs(good, max_run=1000) is good
    assert runs(bad, max_run=1000) == Reason("max_repetition", 401 / 2000)


@given(st.integers(0, 600), st.text(alphabet="nopqrstuvwxyz", min_size=1, max_size=75), st.integers(301, 400))
def test_a_stretch_is_found_wherever_it_lies(place, unit, length):
    text = f"{filling(place)}{(unit * length)[:length]}{filling(1000 - place - length, 1)}"
    assert runs(text, max_run=1000, max_repetition=0.3) == Reason("max_repetition", length / 1000)


# ---- identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "As an AI language model, I cannot",
        "as an ai, I do not have feelings",
        "As a large\nlanguage model, I",
        "As an artificial intelligence, my",
        "I am ChatGPT",
        "I’m just a language model",
        "I'm an AI assistant",
        "I am an AI.",
        "I am an artificial intelligence and",
        "My name is Qwen",
        "I am Claude, an AI",
        "I'm GPT-4o",
        "I was trained by OpenAI",
        "I have been created by Anthropic",
        "My knowledge cutoff is",
        "my training data cut-off",
        "As of my last knowledge update",
        "Sorry, but I can't assist with that",
    ],
)
def test_an_assistant_gives_itself_away(words):
    text = f"A question? {words} so there."
    verdict = identity(text)
    assert verdict.rule == "max_mentions"
    assert verdict.value in " ".join(text.lower().replace("’", "'").split())
    assert identity(text, max_mentions=1) is text
    assert identity(f"{text} {text}", max_mentions=1).rule == "max_mentions"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I am an AI researcher and I train language models.",
        "As an AI researcher, I read much.",
        "My name is Claude and this is my sister.",
        "I am Claude, the painter.",
        "GPT-4 is a large language model by OpenAI.",
        "The model acts as a language model in the decoder.",
        "I'm a virtual assistant to the director.",
        "Sorry, but I can't come.",
        "My training went well; the cutoff was at noon.",
        "As of my last visit, nothing had changed.",
        "He am chatgpting.",
    ],
)
def test_a_person_does_not(text):
    assert identity(text) is text


# ---- script ------------------------------------------------------------------------------------------------------------


def test_script_is_a_share_of_letters():
    assert script("abcdéfgh яя 123 !!!") == "abcdéfgh яя 123 !!!"
    assert script("abcdéfg яяя") == Reason("min_share", 0.7)
    assert script("я" * 8 + "ab", scripts=("cyrillic",)) == "я" * 8 + "ab"
    assert script("日本語々ハンドブック", scripts=("CJK", "katakana")) == "日本語々ハンドブック"
    assert script("日本語ハンドブ", scripts=("cjk",)) == Reason("min_share", 3 / 7)
    assert script("Ａｂ") == "Ａｂ"
    assert script("1 + 1 = 2 ½ €", min_share=1.0) == "1 + 1 = 2 ½ €"
    assert script("ᏣᎳᎩ", scripts=("cherokee",)) == "ᏣᎳᎩ"
    with pytest.raises(BadInput, match=r"'cyrilic'.*did you mean 'cyrillic'"):
        script("a", scripts=("latin", "cyrilic"))


# ---- all three ---------------------------------------------------------------------------------------------------------


@given(st.text() | st.text(alphabet="ab ") | st.text(alphabet="aé語я\0\n ’"), st.sampled_from([runs, identity, script]))
@settings(max_examples=300)
def test_any_text_passes_unchanged_or_is_told(text, filter):
    verdict = filter(text)
    assert verdict is text or isinstance(verdict, Reason)
    assert filter(text[:1] + text[1:]) == verdict


@pytest.mark.parametrize("unit", ["x", "ha ", "\n", "i am an ai. ", "語", "\0"])
def test_a_long_text_takes_no_longer_than_it_must(unit):
    text = unit * (5_000_000 // len(unit))
    assert isinstance(runs(text), Reason) or not text.strip()
    assert isinstance(identity(text), Reason) == ("ai" in unit)
    assert isinstance(script(text), Reason) == (unit == "語")
    assert 0 <= QualityScore(np.zeros(1 << 10, np.float32)).score(text) <= 1


# ---- the learned score -------------------------------------------------------------------------------------------------


def texts(words, count, seed):
    generator = random.Random(seed)
    shared = ["and", "the", "it", "was", "in", "of", "a", "to", "on", "by"]
    return [" ".join(generator.choices(words, k=10) + generator.choices(shared, k=30)) for _ in range(count)]


GOOD = ["theorem", "proof", "lemma", "integral", "measure", "derive", "example", "define"]
BAD = ["buy", "cheap", "click", "casino", "winner", "free", "offer", "discount"]


@pytest.fixture(scope="module")
def learned():
    return QualityScore.fit(texts(GOOD, 60, 1), texts(BAD, 200, 2), bits=14, epochs=10, seed=3)


def test_it_tells_good_from_bad(learned):
    good, bad = ([learned.score(text) for text in texts(words, 50, 9)] for words in (GOOD, BAD))
    assert min(good) > 0.8 and max(bad) < 0.2
    assert 0.1 < learned.score("") < 0.9 and 0.1 < learned.score("unheard words") < 0.9


def test_it_learns_the_order_of_words():
    two = QualityScore.fit(["yes no maybe"] * 20, ["maybe no yes", "no maybe yes"] * 10, bits=12, epochs=100, batch=8)
    assert two.score("yes no maybe") > 0.7 > 0.3 > two.score("maybe no yes")


def test_it_is_a_filter(learned):
    good, bad = texts(GOOD, 1, 5)[0], texts(BAD, 1, 5)[0]
    assert learned.keep(good) is good
    assert learned.keep(bad) == Reason("min_score", learned.score(bad))
    assert learned.keep(bad, min_score=learned.score(bad)) is bad


def test_the_same_seed_gives_the_same_weights(learned):
    again = QualityScore.fit(iter(texts(GOOD, 60, 1)), iter(texts(BAD, 200, 2)), bits=14, epochs=10, seed=3)
    assert np.array_equal(again.weights, learned.weights)
    other = QualityScore.fit(texts(GOOD, 60, 1), texts(BAD, 200, 2), bits=14, epochs=10, seed=4)
    assert not np.array_equal(other.weights, learned.weights)


def test_it_comes_back_from_disk_in_another_process(learned, tmp_path):
    learned.save(tmp_path / "deep" / "score.safetensors")
    learned.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "deep" / "score.safetensors").read_bytes()
    text = "theorem of the casino, näive proof"
    assert QualityScore.load(tmp_path / "again.safetensors").score(text) == learned.score(text)
    code = "import sys; from pascaline.data.quality import QualityScore; print(QualityScore.load(sys.argv[1]).score(sys.argv[2]).hex())"
    command = [sys.executable, "-c", code, str(tmp_path / "again.safetensors"), text]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float.fromhex(result.stdout) == learned.score(text)


def test_what_is_no_score_is_refused(tmp_path):
    path = tmp_path / "score"
    with pytest.raises(BadInput, match="not a saved quality score"):
        QualityScore.load(path)
    path.write_bytes(b"\x80\x04 pickle")
    with pytest.raises(BadInput, match="not a saved quality score"):
        QualityScore.load(path)
    save_file({"weights": np.zeros(8, np.float32)}, path)
    with pytest.raises(BadInput, match="not a quality score of this version"):
        QualityScore.load(path)
    for weights in (np.zeros(7, np.float32), np.zeros(8), np.full(8, np.nan, np.float32), np.zeros((2, 4), np.float32)):
        save_file({"weights": weights}, path, metadata={"features": FEATURES})
        with pytest.raises(BadInput, match="damaged"):
            QualityScore.load(path)
    with pytest.raises(BadInput, match="0 good and 1 bad"):
        QualityScore.fit([], ["x"])


@given(st.text())
def test_any_text_has_a_score(learned, text):
    assert 0 <= learned.score(text) <= 1
    assert learned.score(text) == learned.score(text)
