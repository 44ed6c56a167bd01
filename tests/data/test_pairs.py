"""Pairs from files, as samples, and in packed rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_tokenizer

from pascaline.data.batch import batches, collate
from pascaline.data.loader import ListSamples, Loader
from pascaline.data.pairs import Pair, documents, encode, read, sample, split
from pascaline.errors import BadInput

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "hi?"), ("assistant", "good"), ("assistant", "bad")))


def written(folder: Path, *rows: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi?", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi?", "chosen": [GOOD], "rejected": "bad", "score": 3},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the prompt said twice
    ],
)
def test_all_forms_of_a_pair_are_the_same_pair(row: dict, tmp_path: Path) -> None:
    path = written(tmp_path, "", row)
    assert read(path) == [Pair([USER], GOOD, BAD, f"{path}:2")]


def test_a_conversation_of_several_turns_and_thoughts(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "be kind"}, USER, GOOD, {"role": "user", "content": "and?"}]
    thoughtful = {"role": "assistant", "content": "4", "thinking": "2 + 2"}
    (pair,) = read(written(tmp_path, {"chosen": [*talk, thoughtful], "rejected": [*talk, BAD]}))
    assert pair.prompt == talk and pair.chosen == {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is no pair"),
        ({"prompt": "x", "chosen": "y"}, "is no pair"),
        ({"prompt": 3, "chosen": "y", "rejected": "z"}, "prompt must be a text or a list of messages"),
        ({"prompt": "x", "chosen": "y", "rejected": None}, "rejected must be a text or a list"),
        ({"chosen": "Human: x Assistant: y", "rejected": "Human: x Assistant: z"}, "must be whole conversations"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "the prompt must end with what the assistant answers to"),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "the prompt must end with"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "rejected must have one message of the assistant, and has assist"),
        ({"prompt": "x", "chosen": [USER], "rejected": "z"}, "chosen must have one message of the assistant, and has user"),
        ({"prompt": [{"role": "user"}], "chosen": "y", "rejected": "z"}, 'prompt, message 1 must be an object with two texts, "role"'),
        ({"prompt": "x", "chosen": [{**GOOD, "thinking": 3}], "rejected": "z"}, "reasoning_content must be a text"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named(row: object, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(BadInput, match=said) as error:
        read(path)
    assert f"{path}:2" in str(error.value)


def test_a_missing_or_empty_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="holds no pair"):
        read(written(tmp_path, "\n"))


def test_the_split_is_by_prompt() -> None:
    """All pairs of a prompt are on one side, the same in any data, in the share asked for; never is a side empty."""
    pairs = [Pair([{"role": "user", "content": str(i % 500)}], GOOD, BAD, "") for i in range(1000)]
    out = split(pairs, 0.2)
    assert out[:500] == out[500:] and 0.14 < np.mean(out) < 0.26
    assert split(pairs[::-1], 0.2) == out[::-1] and split(pairs[:300], 0.2) == out[:300]
    for share in (1e-9, 1 - 1e-9):
        few = split(pairs[:2], share)
        assert sum(few) == 1
    with pytest.raises(BadInput, match="one prompt only"):
        split([pairs[0], pairs[500]], 0.5)


def pair(i: int) -> Pair:
    return Pair([{"role": "user", "content": "x" * (i % 7 + 1)}], GOOD | {"content": "good" * (i % 3 + 1)}, BAD, f"f:{i}")


def test_weights_lie_on_the_answers_with_their_signs() -> None:
    tokenizer = tiny_tokenizer()
    for stream, each in (("sum", 1.0), ("mean", None), ("last", 1.0)):
        own = sample(pair(4), tokenizer, stream)
        weight = own.streams["score" if stream == "last" else "pair"]
        for part, document, sign, answer in zip(
            np.split(weight, own.begins[1:]), documents([own]), (1, -1), (pair(4).chosen, BAD), strict=True
        ):
            before, after = encode(tokenizer, pair(4).prompt, answer)
            assert document.tolist() == before + after and after[-1] == tokenizer.end
            assert not part[: len(before)].any()
            ends = part[len(before) :] if stream != "last" else part[-1:]
            assert ends == pytest.approx(np.full(len(ends), sign * (each or 1 / len(after))))
            assert stream != "last" or not part[:-1].any()


def test_the_ids_are_those_of_the_rendered_conversation() -> None:
    tokenizer = tiny_tokenizer()
    for answer in (GOOD, GOOD | {"reasoning_content": "hm"}):
        before, after = encode(tokenizer, [USER], answer)
        assert tokenizer.decode(before + after, special=True) == tokenizer.render([USER, answer])


def test_both_answers_of_a_pair_stand_in_the_same_row_and_do_not_see_each_other() -> None:
    tokenizer = tiny_tokenizer()
    samples = [sample(pair(i), tokenizer, "sum") for i in range(40)]
    for batch in batches(samples, 64, 3, tokenizer.pad):
        for ids, positions, weight in zip(batch.document_ids, batch.positions, batch.streams["pair"], strict=True):
            for d in range(int(ids.max()) + 1):
                inside = ids == d
                assert positions[inside].tolist() == list(range(int(inside.sum())))
                assert {1.0: 0, -1.0: 1}[float(weight[inside][-1])] == d % 2
            assert (int(ids.max()) + 1) % 2 == 0


def test_a_document_of_a_row_is_known_by_its_pair() -> None:
    """What a guard names when it leaves out a step."""
    tokenizer = tiny_tokenizer()
    samples = [sample(pair(i), tokenizer, "sum") for i in range(12)]
    loader = Loader(ListSamples(samples), 64, 4, 2, tokenizer.pad, seed=3)
    for batch, names in zip(loader.step(0), loader.documents(0), strict=True):
        assert {(b, int(d)) for b, row in enumerate(batch.document_ids) for d in row.unique() if d >= 0} == names.keys()
        for (b, d), name in names.items():
            own = documents([samples[name["sample"]]])[d % 2]
            assert batch.tokens[b][batch.document_ids[b] == d].tolist() == own.tolist()


def test_no_document_begins_with_a_weight() -> None:
    own = sample(pair(0), tiny_tokenizer(), "sum")
    own.streams["pair"][:] = 1.0
    batch = collate([[own, own]], 64, 0)
    starts = (batch.positions[0] == 0) & (batch.document_ids[0] >= 0)
    assert starts.sum() == 4 and not batch.streams["pair"][0][starts].any() and batch.streams["pair"][0].sum() == 2 * len(own.tokens) - 4
