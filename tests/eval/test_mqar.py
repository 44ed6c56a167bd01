"""Associative recall: texts of the form that was asked for, and models whose recall is known."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from pascaline.engine import Engine
from pascaline.errors import BadInput
from pascaline.eval import mqar, niah
from pascaline.eval.plan import Plan
from pascaline.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.tiny_tokenizer()


class Induction:
    """A model that says what followed the token the last time, if that is at most `reach` tokens ago; else `silent`."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, reach: int = 10**9, positions: int = 256, silent: int = 0):
        self.vocabulary, self.reach, self.silent, self.read = vocabulary, reach, silent, 0
        self.config = SimpleNamespace(max_position_embeddings=positions, vocab_size=vocabulary)

    def hidden(self, tokens_BT: Tensor) -> tuple[Tensor, list[Any]]:
        said_BT = torch.full_like(tokens_BT, self.silent)
        for row, tokens in enumerate(tokens_BT.tolist()):
            last: dict[int, int] = {}
            for at, token in enumerate(tokens):
                if token in last and at - last[token] <= self.reach:
                    said_BT[row, at] = tokens[last[token] + 1]
                last[token] = at
        self.read += tokens_BT.numel()
        return torch.nn.functional.one_hot(said_BT, self.vocabulary).float(), []

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def measure(model: Any, tokenizer: Tokenizer, problems: int = 40, **dials: Any) -> dict[str, Any]:
    engine = SimpleNamespace(model=model, tokenizer=tokenizer)
    found = mqar.mqar(engine, Plan(task="mqar", problems=problems, dials=dials), lambda done, total: None)  # type: ignore[arg-type]
    return json.loads(json.dumps(found))


def texts(tokenizer: Tokenizer, length: int = 128, pairs: int = 8, count: int = 50, alpha: float = 0.01) -> list[mqar.Text]:
    tokens, rng = mqar.plain_tokens(tokenizer, tokenizer.vocab_size), np.random.default_rng(3)
    return [mqar.write(tokens, tokenizer.prefix, length, pairs, alpha, rng) for _ in range(count)]


def test_a_text_is_pairs_then_each_key_once_more_with_its_value(tokenizer: Tokenizer) -> None:
    for length in (128, 33):
        for text in texts(tokenizer, length):
            ids, begin = text.ids.tolist(), len(tokenizer.prefix)
            assert ids[:begin] == tokenizer.prefix and length - 1 <= len(ids) <= length
            pairs = dict(zip(ids[begin : begin + 16 : 2], ids[begin + 1 : begin + 16 : 2], strict=True))
            assert len({*pairs, *pairs.values()}) == 16  # keys and values are distinct tokens
            assert [pairs[ids[at]] for at in text.at] == text.values.tolist() == [ids[at + 1] for at in text.at]
            assert sorted(ids[at] for at in text.at) == sorted(pairs) and min(text.at) >= begin + 16
            assert all(ids.count(token) == 2 for token in (*pairs, *pairs.values()))  # so that no noise is a key or a value


def test_queries_come_in_any_order_and_mostly_soon(tokenizer: Tokenizer) -> None:
    places = np.concatenate([text.at for text in texts(tokenizer, 256, 4, 400)]) - 9
    even = np.concatenate([text.at for text in texts(tokenizer, 256, 4, 400, alpha=1.0)]) - 9
    assert np.median(places) < 40 < 100 < np.median(even) < 145 and places.max() > 200
    first = np.mean([text.at.argmin() for text in texts(tokenizer, 256, 4, 400)])
    assert 1.3 < first < 1.7  # of the keys 0 to 3 each is asked first as often


def test_gaps_follow_the_power_law(tokenizer: Tokenizer) -> None:
    places = [(int(text.at[0]) - 3) // 2 for text in texts(tokenizer, 64, 1, 4000)]
    likely = np.arange(1, 31, dtype=np.float64)[: (64 - 1 - 2) // 2] ** -0.99
    likely /= likely.sum()
    share = np.bincount(places, minlength=len(likely)) / 4000
    assert np.abs(share - likely).max() < 4 * np.sqrt(0.25 / 4000)


def test_tokens_are_plain_text(tokenizer: Tokenizer) -> None:
    tokens = mqar.plain_tokens(tokenizer, tokenizer.vocab_size).tolist()
    said = [tokenizer.piece(i).decode() for i in tokens]
    assert all(text.strip() and text.isprintable() for text in said) and {"a", "7"} <= set(said)
    assert not any(tokenizer.is_special(i) for i in tokens) and tokenizer.encode("\n")[0] not in tokens
    assert mqar.plain_tokens(tokenizer, 100).max() < 100  # a model may have fewer


def test_perfect_recall_is_right_everywhere(tokenizer: Tokenizer) -> None:
    found = measure(Induction(tokenizer.vocab_size), tokenizer, lengths=[80, 128, 256], pairs=[4, 8, 16])
    assert [(c["length"], c["pairs"]) for c in found["cells"]] == [(n, k) for n in (80, 128, 256) for k in (4, 8, 16)]
    assert all((c["recall"], c["among"], c["n"], c["chance"]) == (1.0, 1.0, 4, 1 / c["pairs"]) for c in found["cells"])
    assert (found["score"], found["among"]["score"], found["n"]) == (1.0, 1.0, 36) and len(set(found["keys"])) == 36


def test_a_model_that_forgets_loses_what_lies_far_back(tokenizer: Tokenizer) -> None:
    found = measure(Induction(tokenizer.vocab_size, reach=40), tokenizer, 400, lengths=[64, 256], pairs=[4], alpha=1.0)
    near, far = (cell["recall"] for cell in found["cells"])
    assert 0.5 < near < 0.9 and 0.05 < far < 0.3


def test_a_random_model_is_at_chance_among_the_values_and_at_nothing_among_all(tokenizer: Tokenizer) -> None:
    model = tiny.tiny_model(vocab_size=tokenizer.vocab_size)
    found = measure(model, tokenizer, 400, lengths=[64, 128], pairs=[4, 8])
    for cell in found["cells"]:
        assert abs(cell["among"] - cell["chance"]) < 4 * np.sqrt(cell["chance"] / (cell["n"] * cell["pairs"]))
    among = found["among"]
    assert among["low"] <= among["chance"] == (1 / 4 + 1 / 8) / 2 <= among["high"] and found["score"] < 0.03


def test_the_likeliest_token_of_all_counts_and_that_of_the_values_beside_it(tokenizer: Tokenizer) -> None:
    """One that says a special token first and the value second is never right, but knows which of the values it is."""

    class Shy(Induction):
        def head(self, hidden: Tensor) -> Tensor:
            return hidden + 2 * torch.nn.functional.one_hot(torch.tensor(tokenizer.end), self.vocabulary)

    found = measure(Shy(tokenizer.vocab_size), tokenizer, lengths=[64], pairs=[4])
    assert (found["score"], found["among"]["score"]) == (0.0, 1.0)


def test_the_same_plan_gives_the_same_texts_and_a_cell_does_not_depend_on_others(tokenizer: Tokenizer) -> None:
    model = tiny.tiny_model(vocab_size=tokenizer.vocab_size)
    whole = measure(model, tokenizer, 20, lengths=[64, 128], pairs=[4, 8])
    assert measure(model, tokenizer, 20, lengths=[64, 128], pairs=[4, 8]) == whole
    one = measure(model, tokenizer, 5, lengths=[128], pairs=[4])
    assert one["cells"] == [cell for cell in whole["cells"] if (cell["length"], cell["pairs"]) == (128, 4)]


def test_what_does_not_fit_is_left_out_and_said(tokenizer: Tokenizer) -> None:
    found = measure(Induction(tokenizer.vocab_size, positions=128), tokenizer, lengths=[64, 256], pairs=[8, 16, 100])
    assert [(c["length"], c["pairs"]) for c in found["cells"]] == [(64, 8)]
    assert found["left_out"]["64 x 16"] == "16 pairs and their queries take 65 tokens" and "128 positions" in found["left_out"]["256 x 8"]
    few = measure(Induction(tokenizer.vocab_size, positions=1024), tokenizer, lengths=[1024], pairs=[100])
    assert few["score"] is None and few["among"]["score"] is None and "tokens of text" in few["left_out"]["1024 x 100"]


def test_lengths_are_powers_of_two_up_to_the_models_and_nothing_is_read_twice(tokenizer: Tokenizer) -> None:
    model = Induction(tokenizer.vocab_size, positions=300)
    found = measure(model, tokenizer, 6, pairs=[4])
    assert [c["length"] for c in found["cells"]] == [64, 128, 256]
    assert model.read <= 2 * (64 + 128 + 256)  # one reading a text, whatever the number of its queries


def test_progress_is_told_up_to_its_end_and_the_map_can_be_drawn(tokenizer: Tokenizer) -> None:
    told: list[tuple[int, int]] = []
    engine = Engine(tiny.tiny_model(vocab_size=tokenizer.vocab_size), tokenizer, device="cpu")
    found = mqar.mqar(engine, Plan(task="mqar", problems=4, dials={"pairs": [4, 8]}), lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] and [c["length"] for c in found["cells"]] == [64, 64, 128, 128]
    svg = niah.draw(found, "Recall of pairs")
    assert svg is not None and "pairs of key and value" in svg


@pytest.mark.parametrize("dials", [{"pairs": []}, {"pairs": [0]}, {"alpha": 0.0}, {"alpha": 2.0}, {"lengths": [64.5]}, {"length": [64]}])
def test_a_wrong_dial_is_refused_in_a_sentence(tokenizer: Tokenizer, dials: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(dials))):
        measure(Induction(tokenizer.vocab_size), tokenizer, **dials)
