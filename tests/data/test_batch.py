"""Packing loses, mixes and cuts nothing; a batch says for each token where it stands and what it weighs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.data.batch import Sample, batches, collate, pack

LENGTHS = st.integers(1, 60).flatmap(lambda row: st.tuples(st.just(row), st.lists(st.integers(1, row), max_size=80)))


def naive_best_fit(lengths: list[int], row: int) -> int:
    """How many rows best fit decreasing takes, by looking at every open row."""
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, s in enumerate(space) if s >= length]
        if fitting:
            space[min(fitting, key=lambda i: space[i])] -= length
        else:
            space.append(row - length)
    return len(space)


@settings(max_examples=200, deadline=None)
@given(LENGTHS)
def test_every_document_once_no_row_over_full_and_as_few_rows_as_best_fit(case):
    row, lengths = case
    rows = pack(lengths, row)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in r) for r in rows]
    assert all(0 < f <= row for f in filled)
    assert len(rows) == naive_best_fit(lengths, row)
    if len(filled) > 1:  # no two rows could have been one
        assert sum(sorted(filled)[:2]) > row


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_nearly_full(seed):
    """Documents as texts have them: mostly short, some long. Within a percent of the lower bound."""
    lengths = np.clip(np.random.default_rng(seed).lognormal(4, 1, 5000).astype(int), 1, 512)
    rows = pack(lengths, 512)
    assert len(rows) <= 1.01 * -(-int(lengths.sum()) // 512) + 1


def test_packing_repeats():
    lengths = np.random.default_rng(0).integers(1, 33, 500)
    assert pack(lengths, 32) == pack(lengths.tolist(), 32)


def sample(start: int, length: int) -> Sample:
    """Tokens and weights that tell where they came from."""
    tokens = np.arange(start, start + length)
    return Sample(tokens, {"ce": tokens / 1000 + 1})


def test_collate_lays_documents_side_by_side():
    batch = collate([[sample(10, 3), sample(20, 1), sample(30, 2)], [sample(40, 8)]], 8, pad=99)
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 30, 31, 99, 99], list(range(40, 48))]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 0], list(range(8))]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 2, 2, -1, -1], [0] * 8]
    weights = [[0, 1.011, 1.012, 0, 0, 1.031, 0, 0], [0, *(1 + t / 1000 for t in range(41, 48))]]
    assert batch.streams["ce"].tolist() == [pytest.approx(w) for w in weights]
    assert str(batch.tokens.dtype) == "torch.int64" and str(batch.streams["ce"].dtype) == "torch.float32"


def test_a_stream_that_only_some_samples_have_is_zero_for_the_others():
    tokens = np.arange(3)
    batch = collate([[Sample(tokens, {"ce": np.ones(3)}), Sample(tokens, {"rl": np.full(3, 2.0)})], []], 7, 0)
    assert batch.streams["ce"].tolist() == [[0, 1, 1, 0, 0, 0, 0], [0] * 7]
    assert batch.streams["rl"].tolist() == [[0, 0, 0, 0, 2, 2, 0], [0] * 7]
    assert batch.document_ids[1].tolist() == [-1] * 7


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 5))
def test_batches_hold_every_token_and_weight_exactly_once(case, micro):
    row, lengths = case
    starts = np.cumsum([0, *lengths])
    found = batches([sample(int(s), n) for s, n in zip(starts, lengths, strict=False)], row, micro, pad=-7)
    assert all(len(b.tokens) <= micro and b.tokens.shape[1] == row for b in found)
    assert all(len(b.tokens) == micro for b in found[:-1])
    real = np.concatenate([b.tokens[b.document_ids >= 0].numpy() for b in found] or [np.zeros(0)])
    assert sorted(real.tolist()) == list(range(sum(lengths)))
    for b in found:
        assert (b.tokens[b.document_ids < 0] == -7).all() and not b.streams["ce"][b.document_ids < 0].any()
        first = (b.positions == 0) & (b.document_ids >= 0)
        assert not b.streams["ce"][first].any() and (b.streams["ce"][(b.positions > 0)] > 1).all()
        for tokens, positions, ids in zip(b.tokens, b.positions, b.document_ids, strict=True):
            for d in set(ids.tolist()) - {-1}:  # each document is whole, in order, counted from 0
                inside = ids == d
                assert positions[inside].tolist() == list(range(int(inside.sum())))
                assert np.diff(tokens[inside].numpy()).tolist() == [1] * (int(inside.sum()) - 1)
