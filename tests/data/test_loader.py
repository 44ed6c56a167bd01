"""Step i of a seed is always the same rows; all documents pass once an epoch, whatever the size of a micro-batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.data import loader as loader_module
from pascaline.data.batch import Sample
from pascaline.data.loader import CorpusSamples, ListSamples, Loader
from pascaline.data.shards import Corpus, ShardWriter
from pascaline.errors import BadInput


def documents(count: int, longest: int = 20, seed: int = 0) -> list[np.ndarray]:
    """Documents of distinct tokens: every token of the corpus has its own id."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count)
    starts = np.cumsum(lengths) - lengths
    return [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]


def listed(count: int, **changes) -> Loader:
    samples = [Sample(d, {"ce": np.ones(len(d), np.float32)}) for d in documents(count)]
    return Loader(ListSamples(samples), **{"row": 32, "rows": 4, "micro": 2, "pad": -1, "seed": 0, **changes})


def rows_of(loader: Loader, steps: range) -> list[list[int]]:
    return [row.tolist() for step in steps for batch in loader.step(step) for row in batch.tokens]


def test_a_step_is_a_function_of_its_number():
    """A fresh loader, asked in another order, gives the same: that is all the state a resumed run needs."""
    one, other = listed(60), listed(60)
    wanted = {step: rows_of(one, range(step, step + 1)) for step in range(12)}
    for step in (11, 3, 0, 7, 11):
        assert rows_of(other, range(step, step + 1)) == wanted[step]


def test_seeds_differ():
    assert rows_of(listed(60), range(3)) != rows_of(listed(60, seed=1), range(3))


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 9])
def test_the_micro_batch_size_changes_no_row(micro):
    loader = listed(60, micro=micro)
    assert rows_of(loader, range(5)) == rows_of(listed(60), range(5))
    sizes = [len(b.tokens) for b in loader.step(0)]
    assert sum(sizes) == 4 and max(sizes) <= micro


def test_the_rows_of_a_step_do_not_change_the_order_of_rows():
    """Row g of the run is the same whether a step takes 2 or 6: another batch size sees the same data in the same order."""
    assert rows_of(listed(60, rows=2), range(9)) == rows_of(listed(60, rows=6), range(3))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7])
def test_ranks_share_the_rows_of_a_step_evenly(ranks):
    """All have as many rows; where they do not come out even, the last one of some is empty. Fewer ranks than rows: nobody has none."""
    whole = listed(60, rows=7)
    shares = [rows_of(listed(60, rows=7, rank=rank, ranks=ranks), range(2, 3)) for rank in range(ranks)]
    real = [[row for row in share if set(row) != {-1}] for share in shares]
    assert [row for share in real for row in share] == rows_of(whole, range(2, 3))
    assert {len(share) for share in shares} == {-(-7 // ranks)} and {len(share) for share in real} <= {7 // ranks, -(-7 // ranks)}


def test_every_epoch_holds_every_document_once_in_another_order():
    loader = listed(60)
    size = loader.epoch_size(0)
    epochs = []
    at = 0
    for epoch in range(4):
        size = loader.epoch_size(epoch)
        rows = rows_of(listed(60, rows=1, micro=1), range(at, at + size))
        assert sorted(t for row in rows for t in row if t >= 0) == list(range(sum(map(len, documents(60)))))
        epochs.append(rows)
        at += size
    assert len({str(rows) for rows in epochs}) == 4


def test_late_epochs_do_not_pack_the_early_ones_again(monkeypatch):
    calls = []
    real = loader_module.pack
    monkeypatch.setattr(loader_module, "pack", lambda *a: calls.append(1) or real(*a))
    loader = listed(60)
    for step in range(loader.epoch_size(0) * 6 // 4):
        loader.step(step)
    assert len(calls) <= 8


def test_windows_bound_the_packing_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(loader_module, "WINDOW", 7)
    loader = listed(60, rows=1, micro=1)
    rows = rows_of(loader, range(loader.epoch_size(0)))
    assert sorted(t for row in rows for t in row if t >= 0) == list(range(sum(map(len, documents(60)))))


def test_documents_are_mixed_not_sorted_by_length():
    """The order of rows must not follow their making (longest first), or the loss would drift within an epoch."""
    loader = listed(400, rows=1, micro=1)
    longest = [max(np.bincount(b.document_ids[0][b.document_ids[0] >= 0])) for i in range(loader.epoch_size(0)) for b in loader.step(i)]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 2


def test_nothing_to_train_on_is_refused():
    with pytest.raises(BadInput, match="nothing"):
        Loader(ListSamples([]), 8, 1, 1, 0, 0)


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(BadInput, match=r"33 tokens.*sequence_length 32"):
        Loader(ListSamples([Sample(np.arange(33), {"ce": np.ones(33)})]), 32, 1, 1, 0, 0)


def test_a_ramp_takes_the_same_rows_in_the_same_order():
    ramped = listed(60, rows=3, ramp=[1, 1, 2, 3])
    assert [sum(len(b.tokens) for b in ramped.step(i)) for i in range(7)] == [1, 1, 2, 3, 3, 3, 3]
    assert rows_of(ramped, range(7)) == rows_of(listed(60, rows=4), range(4))


def test_every_document_of_a_step_has_its_name():
    loader = listed(60, micro=3, ramp=[2])
    for step in range(4):
        batches, names = loader.step(step), loader.documents(step)
        assert len(batches) == len(names)
        for batch, known in zip(batches, names, strict=True):
            found = {(b, int(d)) for b, row in enumerate(batch.document_ids) for d in row.unique() if d >= 0}
            assert found == set(known)
            for (b, d), name in known.items():
                assert batch.tokens[b][batch.document_ids[b] == d].tolist() == loader.samples.get(name["sample"]).tokens.tolist()


# ---- a corpus --------------------------------------------------------------------------------------------------------


def corpus(folder, lengths: list[int]) -> Corpus:
    with ShardWriter(folder, 70_000, max_tokens_per_shard=13) as writer:
        at = 0
        for n in lengths:
            writer.add(np.arange(at, at + n), "test")
            at += n
    return Corpus(folder)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(2, 16))
def test_long_documents_are_cut_and_every_token_is_covered_once(tmp_path_factory, lengths, row):
    samples = CorpusSamples(corpus(tmp_path_factory.mktemp("corpus"), lengths), row)
    found = [samples.get(i) for i in range(len(samples.lengths))]
    assert samples.lengths.tolist() == [len(s.tokens) for s in found] and max(samples.lengths) <= row
    assert len(found) == sum(-(-n // row) for n in lengths)  # no more pieces than needed
    assert np.concatenate([s.tokens for s in found]).tolist() == list(range(sum(lengths)))
    borders = set(np.cumsum(lengths).tolist())
    for s in found:
        assert not any(int(t) in borders for t in s.tokens[1:])  # a piece never crosses into the next document
        assert s.streams["ce"].tolist() == [0.0] + [1.0] * (len(s.tokens) - 1)


def test_a_piece_knows_its_document(tmp_path):
    samples = CorpusSamples(corpus(tmp_path, [5, 40, 1, 33]), 16)
    assert [tuple(samples.name(i).values()) for i in range(len(samples.lengths))] == [
        ("test", d, at) for d, n in enumerate([5, 40, 1, 33]) for at in range(0, n, 16)
    ]  # fmt: skip


def test_a_corpus_through_the_loader(tmp_path):
    lengths = [5, 40, 1, 16, 9, 33]
    loader = Loader(CorpusSamples(corpus(tmp_path, lengths), 16), 16, 2, 1, 0, 3)
    steps = -(-loader.epoch_size(0) // 2)
    seen = torch.cat([b.tokens[b.document_ids >= 0] for i in range(steps) for b in loader.step(i)])
    assert set(seen.tolist()) == set(range(sum(lengths)))
    for batch in loader.step(0):
        assert batch.tokens.dtype == torch.int64 and not batch.streams["ce"][batch.positions == 0].any()


def test_short_and_held_out_documents_are_left_out_whole(tmp_path):
    shards = corpus(tmp_path, [5, 40, 12, 33, 40, 7, 21, 16, 50, 11])
    held_out = shards.held_out(0.5)
    assert 0 < held_out.sum() < 10 and not shards.held_out(0.0).any() and (shards.held_out(0.3) <= held_out).all()
    sizes = np.diff([*shards.starts.tolist(), shards.tokens])
    everything, some = CorpusSamples(shards, 16), CorpusSamples(shards, 16, 0.5, 12)
    kept = np.flatnonzero(~held_out & (sizes >= 12)).tolist()
    assert sorted(set(everything.owner.tolist())) == list(range(10)) and sorted(set(some.owner.tolist())) == kept
    found = sorted(t for i in range(len(some.lengths)) for t in some.get(i).tokens.tolist())
    assert found == sorted(t for i in kept for t in shards.document(i).tolist())


def test_equal_documents_are_on_the_same_side(tmp_path):
    with ShardWriter(tmp_path, 100) as writer:
        for _ in range(3):
            for n in range(20):
                writer.add(np.arange(n, n + 9), "test")
    side = Corpus(tmp_path).held_out(0.5).reshape(3, 20)
    assert (side == side[0]).all() and 0 < side[0].sum() < 20
