"""Shards: what was added comes back across borders; a failed write leaves nothing; a damaged corpus is refused."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.data.shards import Corpus, ShardWriter
from pascaline.errors import BadInput


def build(folder, documents, vocab_size=300, limit=7):
    with ShardWriter(folder, vocab_size, max_tokens_per_shard=limit) as writer:
        for number, ids in enumerate(documents):
            writer.add(ids, f"source {number % 2}")
    return Corpus(folder)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=25), min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([300, 65536, 65537, 200_000]),
    st.data(),
)
def test_what_was_added_comes_back(tmp_path_factory, documents, limit, vocab_size, data):
    folder = tmp_path_factory.mktemp("corpus")
    documents[0][0] = vocab_size - 1
    corpus = build(folder, documents, vocab_size, limit)
    whole = [i for ids in documents for i in ids]
    assert corpus.tokens == len(whole) and corpus.documents == len(documents)
    assert [corpus.document(i).tolist() for i in range(len(documents))] == documents
    assert corpus.starts.dtype == np.uint64
    assert corpus.starts.tolist() == [sum(map(len, documents[:i])) for i in range(len(documents))]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    found = corpus.read(start, stop)
    assert found.tolist() == whole[start:stop] and found.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
    corpus.verify()
    sizes = [(folder / shard["file"]).stat().st_size // found.itemsize for shard in corpus.shards]
    assert all(size == limit for size in sizes[:-1]) and 0 < sizes[-1] <= limit and sum(sizes) == len(whole)


def test_the_files_say_what_they_hold(tmp_path):
    build(tmp_path, [[1, 2, 3, 4, 5], np.array([6, 7, 8], np.int32), [1, 2, 3, 4, 5]])
    assert sorted(os.listdir(tmp_path)) == ["index.json", "shard-00000.bin", "shard-00001.bin"]
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["format"] == 1 and index["dtype"] == "uint16" and index["tokens"] == 13
    assert index["sources"] == ["source 0", "source 1"]
    assert index["documents"]["offset"] == [0, 5, 8] and index["documents"]["source"] == [0, 1, 0]
    first, second, third = index["documents"]["hash"]
    assert first == third != second and len(first) == 16 and int(first, 16) >= 0
    for shard, tokens in zip(index["shards"], (7, 6), strict=True):
        data = (tmp_path / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest() and shard["tokens"] == tokens == len(data) // 2
    assert np.frombuffer((tmp_path / "shard-00000.bin").read_bytes(), "<u2").tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_reading_beyond_the_end_is_an_error(tmp_path):
    corpus = build(tmp_path, [[1, 2, 3]])
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(IndexError):
            corpus.read(start, stop)
    for i in (-1, 1):
        with pytest.raises(IndexError):
            corpus.document(i)


def test_bad_documents_are_refused(tmp_path):
    for ids in ([], [[1]], [1.5], ["a"], [300], [-1], [2**40]):
        with pytest.raises(BadInput, match="document 0 of source 'x'"), ShardWriter(tmp_path, 300) as writer:
            writer.add(ids, "x")
        assert os.listdir(tmp_path) == []
    with pytest.raises(BadInput, match="empty"):
        ShardWriter(tmp_path, 300).close()


def test_a_new_corpus_replaces_the_old_one(tmp_path):
    build(tmp_path, [[1] * 50])
    assert build(tmp_path, [[2, 3]]).document(0).tolist() == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["index.json", "shard-00000.bin"]


def test_a_failure_leaves_nothing_and_an_older_corpus_whole(tmp_path):
    build(tmp_path, [[1, 2, 3]])
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 300, max_tokens_per_shard=4) as writer:
        writer.add([5] * 10, "x")
        raise KeyboardInterrupt
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, at):
    calls = 0
    sync = os.fsync

    def full(fd):
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        build(tmp_path, [[5] * 10], limit=6)
    assert os.listdir(tmp_path) == []


def test_left_overs_of_a_killed_writer_are_swept(tmp_path):
    writer = ShardWriter(tmp_path, 300)
    writer.add([1], "x")
    assert len(os.listdir(tmp_path)) == 1
    with pytest.raises(BadInput, match=r"index\.json is missing"):
        Corpus(tmp_path)
    build(tmp_path, [[1]])
    assert sorted(os.listdir(tmp_path)) == ["index.json", "shard-00000.bin"]


def test_damage_is_named(tmp_path):
    def damaged(name, change):
        build(tmp_path, [[1, 2, 3, 4, 5], [6, 7, 8, 9]])
        path = tmp_path / name
        data = change(path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
        return pytest.raises(BadInput, match=name.replace(".", r"\."))

    for change in (lambda d: None, lambda d: d[:-1], lambda d: d[:-2], lambda d: d + b"\0\0", lambda d: b""):
        with damaged("shard-00001.bin", change):
            Corpus(tmp_path)
    with damaged("shard-00000.bin", lambda d: b"\xff" + d[1:]):
        Corpus(tmp_path).verify()
    for change in (
        lambda d: None,
        lambda d: d[:-20],
        lambda d: b"[]",
        lambda d: b"{}",
        lambda d: b"\xff",
        lambda d: d.replace(b'"format":1', b'"format":2'),
        lambda d: d.replace(b'"uint16"', b'"int8"'),
        lambda d: d.replace(b'"offset":[0,5]', b'"offset":[0,99]'),
        lambda d: d.replace(b"[0,5]", b"[5,0]"),
        lambda d: d.replace(b"[0,5]", b"[0]"),
        lambda d: d.replace(b"[0,5]", b"[-1,5]"),
        lambda d: d.replace(b'"source":[0,1]', b'"source":[0,2]'),
        lambda d: d.replace(b'"tokens":9', b'"tokens":8'),
        lambda d: d.replace(b'"shards"', b'"shard"'),
        lambda d: d.replace(b'"file"', b'"name"'),
    ):
        with damaged("index.json", change):
            Corpus(tmp_path)
