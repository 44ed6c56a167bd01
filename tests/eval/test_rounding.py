"""What a rounded file costs is the plain perplexity of both sets of weights, on text that is always the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from pascaline import tokenizer
from pascaline.errors import BadInput
from pascaline.eval import rounding
from pascaline.model import gguf, hf

pytest.importorskip("gguf")


@pytest.fixture
def folder(tmp_path):
    words = tokenizer.train(["some words to learn, some words to read. " * 20], 300)
    tiny_model(vocab_size=300, hidden_size=32, max_position_embeddings=64).save(tmp_path)
    words.save(tmp_path)
    return tmp_path


def perplexity(model, ids: list[int], length: int) -> float:
    nats = [
        F.cross_entropy(model(torch.tensor([ids[at : at + length]]))[0, :-1], torch.tensor(ids[at + 1 : at + length]), reduction="none")
        for at in range(0, len(ids), length)
        if len(ids[at : at + length]) > 1
    ]
    return math.exp(torch.cat(nats).mean())


@torch.no_grad()
def test_both_numbers_are_the_plain_perplexity(folder):
    (folder / "a.txt").write_text("Words that nobody has read before. " * 30)
    told = rounding.export(folder, folder / "a.gguf", "q8_0", folder / "a.txt", quiet=True)
    ids = tokenizer.Tokenizer.load(folder).encode((folder / "a.txt").read_text())
    model, lost = hf.load(folder), told["perplexity"]
    assert len(ids) > 200 and lost["tokens"] == len(ids) - math.ceil(len(ids) / 64)
    assert lost["before"] == pytest.approx(perplexity(model, ids, 64), rel=1e-5)
    gguf.load_into(model, folder / "a.gguf")
    assert lost["after"] == pytest.approx(perplexity(model, ids, 64), rel=1e-5)
    assert lost["before"] != lost["after"]
    assert f"{lost['before']:.4g} -> {lost['after']:.4g}" in rounding.describe(told)


def test_the_text_without_a_name_is_bounded_and_always_the_same(folder):
    first, again = (rounding._windows(folder, "stdlib") for _ in range(2))
    assert [w.tolist() for w in first] == [w.tolist() for w in again]
    assert 0.95 * rounding.TOKENS < sum(map(len, first)) <= rounding.TOKENS and max(map(len, first)) == 64


@pytest.mark.parametrize("text", ["", "x", None])
def test_a_text_that_cannot_be_measured_is_told_before_anything_is_written(folder, text):
    if text is not None:
        (folder / "a.txt").write_text(text)
    with pytest.raises(BadInput, match=r"a\.txt"):
        rounding.export(folder, folder / "a.gguf", "q8_0", folder / "a.txt", quiet=True)
    assert not (folder / "a.gguf").exists()


def test_float32_costs_nothing_and_nothing_is_measured(folder):
    assert "perplexity" not in rounding.export(folder, folder / "a.gguf", "f32", folder / "none.txt", quiet=True)
