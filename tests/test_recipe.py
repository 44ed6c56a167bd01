"""Recipes: every key has a type, an unknown one is an error that names the nearest, and what is written is what was read."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascaline.errors import BadInput
from pascaline.post.check import check
from pascaline.recipe import Recipe, differences, load, parse, read_setting, to_toml

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
TINY = next(path for path in RECIPES if path.name == "tiny.toml")


def refusal(settings: dict[str, Any]) -> str:
    """What is said about tiny.toml with these settings, by reading it or by the check before a run."""
    with pytest.raises(BadInput) as caught:
        check(load(TINY, settings))
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    return said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_shipped_recipes_can_be_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(500)]
    for name in ("train", "test"):  # what gsm8k.toml wants, which is not ours to give away
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"gsm8k_{name}.jsonl").write_text(
            "\n".join(json.dumps(row | {"question": name + row["question"]}) for row in rows)
        )
    monkeypatch.chdir(tmp_path)
    check(load(path))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sed", "seed"),
        ("pretrane", "pretrain"),
        ("corpus.source", "sources"),
        ("tokenizer.vocab_sise", "vocab_size"),
        ("pretrain.tokns", "tokens"),
        ("sft.epoch", "epochs"),
        ("rl.stpes", "steps"),
        ("rl.clip_hihg", "clip_high"),
        ("eval.problem", "problems"),
        ("puzzles.countdown.trace", "traces"),
        ("puzzles.chain.exampels", "examples"),
        ("puzzles.countdown.dials.numbrs", "numbers"),
        ("puzzles.countdown.quality.plantd", "planted"),
        ("model.hiden_size", "hidden_size"),
        ("model.rope.fator", "factor"),
    ],
)
def test_a_misspelt_key_names_the_nearest(key: str, near: str) -> None:
    said = refusal({key: 1})
    assert key.rsplit(".", 1)[-1] in said and f"did you mean '{near}'?" in said


def test_a_key_near_to_nothing_is_only_named() -> None:
    said = refusal({"puzzles.countdown.zzz": 1})
    assert said == f"{TINY}: puzzles.countdown.zzz is not a known key."


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rl.steps", "50", "rl.steps = '50' is wrong: input should be a valid integer"),
        ("rl.steps", True, "valid integer"),
        ("rl.steps", 2.5, "valid integer"),
        ("pretrain.lr", "fast", "pretrain.lr = 'fast' is wrong"),
        ("pretrain.lr", float("inf"), "finite"),
        ("pretrain.lr", float("nan"), "pretrain.lr = nan is wrong"),
        ("corpus.sources", "stdlib", "corpus.sources = 'stdlib' is wrong: input should be a valid list"),
        ("corpus.sources", ["stdlib", 3], "corpus.sources.1 = 3 is wrong"),
        ("rl", 3, "rl must be a table"),
        ("puzzles.countdown", 3, "puzzles.countdown must be a table"),
        ("puzzles", [], "puzzles = [] is wrong"),
        ("model.hidden_size", "wide", "model.hidden_size = 'wide' is wrong"),
        ("puzzles.countdown.dials.numbers", "three", "numbers='three'"),
        ("puzzles.countdown.quality.planted", "often", "planted = 'often' is wrong: it must look like 0.35"),
        ("puzzles.countdown.quality.planted", True, "must look like"),
        ("puzzles.countdown.quality.attempts", 3.5, "attempts = 3.5 is wrong: it must look like 12"),
        ("puzzles.countdown.quality.attempts", [1, 2], "must look like 12"),
    ],
)
def test_a_wrong_type_is_named(key: str, value: Any, words: str) -> None:
    assert words in refusal({key: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rl.samples": 1}, "rl.samples = 1 is wrong: input should be greater than or equal to 2"),
        ({"pretrain.lr": 0.0}, "greater than 0"),
        ({"rl.clip_low": 1.5}, "less than or equal to 1"),
        ({"rl.wrong_reward": 0.5}, "less than or equal to 0"),
        ({"eval.top_p": 1.01}, "eval.top_p"),
        ({"seed": -1}, "seed = -1"),
        ({"rl.schedule": "linear"}, "'constant', 'cosine' or 'wsd'"),
        ({"dtype": "int8"}, "'auto', 'float32' or 'bfloat16'"),
        ({"model.num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4 experts a token may reach"),
        ({"model.qk_rope_head_dim": 7}, "qk_rope_head_dim is 7, it must be even"),
        ({"model.num_hidden_layers": 0}, "num_hidden_layers is 0, it must be at least 1"),
        ({"model.n_group": 3}, "does not divide"),
        ({"model.preset": "nanno"}, "did you mean 'nano'?"),
        ({"model.vocab_size": 400}, "set tokenizer.vocab_size instead"),
        ({"tokenizer.vocab_size": 262}, "take at least 263"),
        ({"sft.sequence_length": 513}, "sft.sequence_length = 513 is more than the model's 512 positions"),
        ({"puzzles.countdown.dials.numbers": 9}, "numbers=9 must be a whole number from 3 to 4"),
        ({"puzzles.countdown.dials.largest": [30, 20]}, "largest=[30, 20]"),
        ({"puzzles.countdown.quality.planted": 1.5}, "planted=1.5 must be a share from 0 to 1"),
        ({"puzzles.countdown.quality.attempts": 0}, "attempts=0 must be at least 1"),
        ({"puzzles.countdwon.traces": 3}, "did you mean 'countdown'?"),
        ({"puzzles.nowhere:puzzle.traces": 3}, "cannot be loaded"),
        ({"rl.puzzles": ["chian"]}, "rl.puzzles = ['chian'] must name puzzles of the recipe (countdown, chain)"),
        ({"eval.puzzles": []}, "eval.puzzles = [] must name puzzles"),
        ({"puzzles.countdown.dials.largest": 4, "eval.problems": 1000}, "held-out"),
        ({"corpus.sources": ["stdlip"]}, "corpus source 'stdlip'"),
        ({"corpus.sources": [], "puzzles.countdown.traces": 0, "puzzles.chain.traces": 0}, "the corpus would be empty"),
        ({"corpus.max_bytes": 0, "puzzles.countdown.traces": 0, "puzzles.chain.traces": 0}, "the corpus would be empty"),
        ({"puzzles.countdown.examples": 0, "puzzles.chain.examples": 0}, "sft has nothing to learn from"),
        ({"corpus.filters.gofer_quality": {}}, "corpus.filters.gofer_quality is not a filter; did you mean 'gopher_quality'?"),
        (
            {"corpus.filters.gopher_quality.min_word": 3},
            "corpus.filters.gopher_quality.min_word is not a known key; did you mean 'min_words'?",
        ),
        ({"corpus.filters.gopher_quality.min_words": "few"}, "min_words = 'few' is wrong: it must look like 50"),
        ({"corpus.filters.gopher_repetition.top_ngrams": {"1": 0.2}}, "must look like {'2': 0.2, '3': 0.18, '4': 0.16}"),
        ({"corpus.filters.gopher_repetition.top_ngrams": {"2": "much"}}, "must look like"),
        ({"corpus.filters.c4.unwanted": "cookies"}, "must look like ['javascript'"),
        ({"corpus.filters.script.scripts": ["latn"]}, "script 'latn'"),
        ({"corpus.filters.quality.good": ["stdlib"]}, "name files or folders in both good and bad"),
        (
            {"corpus.filters.quality.good": ["nowhere"], "corpus.filters.quality.bad": ["stdlib"]},
            "'nowhere' is neither a file nor a folder",
        ),
        ({"corpus.decontaminate": ["nowhere.jsonl"]}, "'nowhere.jsonl' is neither"),
        ({"corpus.dedup": "fuzzy"}, "'none', 'exact' or 'minhash'"),
        ({"corpus.mixture": {"stdlip": 1.0}}, "corpus.mixture: 'stdlip' is not one of corpus.sources (stdlib); did you mean 'stdlib'?"),
        ({"corpus.mixture": {"zzz": 1.0}}, "corpus.mixture: 'zzz' is not one of corpus.sources (stdlib)."),
        ({"corpus.mixture": {"puzzle:countdown": 1.0}}, "how much there is of 'puzzle:countdown', puzzles.countdown.traces says"),
        ({"corpus.mixture": {"stdlib": 0.0}}, "corpus.mixture.stdlib = 0.0 is wrong: input should be greater than 0"),
        ({"corpus.mixture": {"stdlib": "much"}}, "corpus.mixture.stdlib = 'much' is wrong"),
        ({"corpus.mixture": {"stdlib": 1.0}, "corpus.sources": ["stdlib", "stdlib"]}, "corpus.sources names 'stdlib' twice"),
        ({"corpus.max_repeats": 4.0}, "corpus.max_repeats = 4 is of a mixture's sources: give corpus.mixture their weights"),
        ({"corpus.mixture": {"stdlib": 1.0}, "corpus.max_repeats": 0.5}, "greater than or equal to 1"),
        ({"corpus.processes": -1}, "corpus.processes = -1 is wrong"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_run(settings: dict[str, Any], words: str) -> None:
    assert words in refusal(settings)


def test_missing_and_empty_sources_are_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "texts.md").write_text("x")
    assert "/texts.md'?" in refusal({"corpus.sources": [str(tmp_path / "text.md")]})
    (tmp_path / "empty").mkdir()
    assert "empty corpus" in refusal({"corpus.sources": [str(tmp_path / "empty")]})
    mixture = {"corpus.sources": ["stdlib", str(tmp_path / "empty")], "corpus.mixture": {"stdlib": 2.0}}
    assert "empty corpus" in refusal(mixture)  # its share could never be filled
    (tmp_path / "blank.txt").write_text(" \n")
    assert "blank.txt was left out (empty)" in refusal({"corpus.sources": [str(tmp_path / "blank.txt")]})


def test_bad_files(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(BadInput) as caught:
            load(path)
        return str(caught.value)

    (tmp_path / "laptop.toml").write_text("seed = 1\nseed = 2\n")
    assert "is not valid TOML" in said(tmp_path / "laptop.toml") and "line 2" in said(tmp_path / "laptop.toml")
    assert said(tmp_path / "laptp.toml").endswith("there is no recipe " + str(tmp_path / "laptp.toml") + "; did you mean 'laptop.toml'?")
    assert said(tmp_path / "zzz") == f"there is no recipe {tmp_path / 'zzz'}."
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    assert "must be a TOML text file" in said(tmp_path / "binary") and "must be a TOML text file" in said(tmp_path)


def test_settings() -> None:
    assert read_setting("rl.steps=50") == ("rl.steps", 50)
    assert read_setting(" device = cpu") == ("device", "cpu")
    assert read_setting('corpus.sources=["a=b", "c"]') == ("corpus.sources", ["a=b", "c"])
    assert read_setting("rl.lr=1e-4")[1] == 1e-4 and read_setting("x=")[1] == ""
    assert read_setting("seed=1\nrl.steps=2") == ("seed", "1\nrl.steps=2")  # not the half of it
    for wrong in ("rl.steps", "=5", "  =5"):
        with pytest.raises(BadInput, match=r"must look like rl\.steps=50"):
            read_setting(wrong)
    assert load(TINY, {"rl.steps": 7, "puzzles.chain.dials.steps": [2, 3]}).puzzles["chain"].dials == {"steps": [2, 3]}
    with pytest.raises(BadInput, match="seed is not a table"):
        load(TINY, {"seed.x": 1})


def test_later_settings_win_and_the_rest_stays() -> None:
    plain, changed = load(TINY), load(TINY, {"rl.steps": 99})
    assert changed.rl.steps == 99
    assert differences(plain.model_dump(), changed.model_dump()) == ["rl.steps"]
    more = load(TINY, {"rl.steps": 99, "puzzles.coin:puzzle.traces": 1, "model.q_lora_rank": 8})
    assert differences(plain.model_dump(), more.model_dump()) == ["model.q_lora_rank", "puzzles.coin:puzzle", "rl.steps"]


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    source=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lr=st.floats(1e-30, 1e30),
    flag=st.booleans(),
    attempts=st.lists(st.integers(-5, 5), max_size=3),
)
def test_a_resolved_recipe_reads_back_as_itself(name: str, source: str, lr: float, flag: bool, attempts: list[int]) -> None:
    raw = {
        "corpus": {"sources": [source], "mixture": {source: lr}, "max_repeats": 4},
        "puzzles": {name: {"traces": 3, "dials": {name: attempts}, "quality": {"deep": attempts, "word": source, "flag": flag}}},
        "model": {"preset": "mini", "rope": {"factor": lr}, "norm_topk_prob": flag},
        "pretrain": {"lr": lr},
    }
    once = parse(raw, "here")
    again = parse(tomllib.loads(to_toml(once)), "there")
    assert again == once and to_toml(again) == to_toml(once)
    assert Recipe.model_validate(once.model_dump(mode="json")) == once


def test_a_chain_is_composed_of_named_tables() -> None:
    raw = {
        "chain": ["sft", "rl", "reject", "sft-restart", "rl-all"],
        "reject": {},
        "rl-all": {"steps": 3},
        "sft-restart": {"start": "pretrain"},
    }
    found = parse(raw, "")
    assert found.stages == ("corpus", "tokenizer", "pretrain", *raw["chain"], "eval")
    assert [found.before(name) for name in raw["chain"]] == ["pretrain", "sft", "rl", "pretrain", "sft-restart"]
    assert found.talkers == ("sft", "rl", "sft-restart", "rl-all") and getattr(found, "rl-all").steps == 3
    assert parse(tomllib.loads(to_toml(found)), "") == found == parse(json.loads(json.dumps(found.model_dump(mode="json"))), "")
    assert found != parse({**raw, "rl-all": {"steps": 4}}, "")


def test_a_student_of_its_own_shape_starts_from_nothing() -> None:
    found = parse(
        {"chain": ["sft", "pretrain-student", "pretrain-more"], "pretrain-student": {"model": {"hidden_size": 64}}, "pretrain-more": {}}, ""
    )
    assert found.before("pretrain-student") is None and found.before("pretrain-more") == "pretrain-student"


def test_a_reward_model_is_no_start() -> None:
    found = parse({"chain": ["sft", "prefer", "rl"], "prefer": {"method": "reward"}}, "")
    assert found.before("prefer") == found.before("rl") == "sft"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"chain": ["sft", "rl-al"], "rl-all": {}}, "chain names 'rl-al', and there is no table [rl-al]; did you mean 'rl-all'?"),
        ({"rl-all": {}}, "[rl-all] has no place in the chain: add it to `chain` (sft, rl)"),
        ({"chain": ["sft", "rl-all"], "rl-all": {"stepps": 2}}, "x.rl-all.stepps is not a known key; did you mean 'steps'?"),
        ({"chain": ["sft", "sft"]}, "chain has 'sft' twice: give the second a table of its own, like [sft-again]"),
        ({"rl": {"start": "sftt"}}, "rl.start = 'sftt' is no earlier stage with a model (pretrain, sft); did you mean 'sft'?"),
        ({"sft": {"start": "rl"}}, "sft.start = 'rl' is no earlier stage with a model (pretrain)"),
        ({"chain": ["pretrain-x", "sft"], "pretrain-x": {"start": "pretrain", "model": {"preset": "nano"}}}, "both a start and a model"),
        ({"chain": []}, "chain has no stage that teaches the model to answer"),
        ({"chain": ["sft", "reject"]}, "there is no table [reject]"),
    ],
)
def test_a_chain_that_does_not_fit_is_one_sentence(raw: dict, words: str) -> None:
    with pytest.raises(BadInput, match=re.escape(words)):
        parse(raw, "x")
