"""Sources: everything fit is found in a fixed order, everything unfit is told, budgets hold."""

import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.data.sources import PIECE, documents
from pascaline.errors import BadInput


def read(sources, max_bytes=None):
    """(documents, what was left out as {id: filter})."""
    left_out = []
    found = list(documents([str(source) for source in sources], max_bytes, left_out.append))
    assert all(set(entry) == {"id", "source", "filter", "value", "text"} for entry in left_out)
    json.dumps(left_out)
    return found, {entry["id"]: entry["filter"] for entry in left_out}


def test_a_folder_gives_what_is_fit_and_tells_the_rest(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "one.md").write_bytes("\ufeffschön\r\nzwei".encode())
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "UPPER.TXT").write_text("loud")
    (tmp_path / "latin.txt").write_bytes(b"abc" * 10 + b"\xe9 x")
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / "nul.py").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    os.symlink(tmp_path / "nowhere.txt", tmp_path / "link.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    found, left_out = read([tmp_path])
    assert [(d.id, d.text) for d in found] == [("UPPER.TXT:0", "loud"), ("a.py:0", "x = 1\n"), ("b/one.md:0", "schön\r\nzwei")]
    assert {d.source for d in found} == {str(tmp_path)}
    assert left_out == {
        ".git": "folder",
        "latin.txt": "encoding",
        "cut.txt": "encoding",
        "nul.py": "binary",
        "empty.txt": "empty",
        "blank.txt": "empty",
        "picture.png": "suffix",
        "link.txt": "unreadable",
        "pipe.txt": "unreadable",
    }
    assert read([tmp_path / "a.py"])[0][0].text == "x = 1\n"


def test_an_excluded_entry_shows_where_and_what(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"x" * 2_000_000 + b"\xff" + b"y" * 300)
    (tmp_path / "good.txt").write_text("ok")
    entries = []
    list(documents([str(tmp_path)], None, entries.append))
    assert entries == [{"id": "bad.txt", "source": str(tmp_path), "filter": "encoding", "value": 2_000_000, "text": "x" * 200}]


def test_jsonl_gives_one_document_a_line(tmp_path):
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"text": "two\\nlines", "more": 1}',
        b"{broken",
        b'{"other": 1}',
        b"[1]",
        b'"text"',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": "a\\u0000"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        '{"text": "zwölf"}'.encode(),
    ]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    found, left_out = read([tmp_path])
    assert [(d.id, d.text) for d in found] == [("d.jsonl:1", "one"), ("d.jsonl:3", "two\nlines"), ("d.jsonl:14", "zwölf")]
    kinds = ["json", "column", "column", "column", "column", "empty", "binary", "encoding", "encoding", "json"]
    assert left_out == {f"d.jsonl:{line}": kind for line, kind in zip(range(4, 14), kinds, strict=True)}


def test_parquet_gives_its_text_column(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": ["one", None, "three"]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:100])
    found, left_out = read([tmp_path])
    assert [(d.id, d.text) for d in found] == [("a.parquet:0", "one"), ("a.parquet:2", "three")]
    assert left_out == {"a.parquet:1": "column", "b.parquet": "column", "c.parquet": "unreadable"}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"pascaline\[hub\]"):
        read([tmp_path / "a.parquet"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["x", "é", "日", "\U0001f600", "word and "]), st.integers(1, 3000)), min_size=1, max_size=20))
def test_pieces_are_bounded_and_together_are_the_file(tmp_path_factory, lines):
    text = "\n".join(what * times for what, times in lines)
    path = tmp_path_factory.mktemp("pieces") / "long.txt"
    path.write_bytes(text.encode())
    found, _ = read([path])
    assert "".join(d.text for d in found) == text
    assert [d.id for d in found] == [f"long.txt:{i}" for i in range(len(found))]
    assert all(0 < len(d.text.encode()) <= PIECE for d in found)
    if max(len(what) * times for what, times in lines) < PIECE // 4:
        assert all(d.text.endswith("\n") for d in found[:-1])


def test_the_standard_library_is_sampled_widely_and_always_the_same():
    first, left_out = read(["stdlib"], 600_000)
    assert sum(len(d.text.encode()) for d in first) == 600_000
    assert read(["stdlib"], 600_000)[0] == first
    assert read(["stdlib"], 300_000)[0][:-1] == first[: len(read(["stdlib"], 300_000)[0]) - 1]
    names = {d.id.split(":")[0] for d in first}
    assert len(names) > 15 and len({name.split("/")[0] for name in names}) > 10
    root = Path(sysconfig.get_path("stdlib"))
    assert all(
        (root / name).read_text().startswith(first_piece)
        for name, first_piece in [(d.id[:-2], d.text) for d in first if d.id.endswith(":0")][:10]
    )
    assert not [n for n in names if {"test", "site-packages", "idlelib", "__pycache__"} & set(n.split("/"))]
    assert set(left_out.values()) <= {"empty"}


def test_a_budget_holds_and_is_shared_between_sources(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i:02}.txt").write_text(name * (1000 if name == "a" else 100))
    for budget in (1, 999, 1500, 4000, 10_000):
        found, _ = read([tmp_path / "a", tmp_path / "b"], budget)
        given_ = {name: sum(len(d.text) for d in found if d.source.endswith(name)) for name in "ab"}
        assert sum(given_.values()) == min(budget, 22_000)
        if budget == 4000:
            assert abs(given_["a"] - given_["b"]) <= 1000  # as even as the longest document allows
    assert sum(len(d.text) for d in read([tmp_path / "a", tmp_path / "b"])[0]) == 22_000
    (tmp_path / "c.txt").write_text("ééé")
    assert read([tmp_path / "c.txt"], 3)[0][0].text == "é"  # never half a character


def test_what_is_not_there_and_what_is_empty_is_said(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(BadInput, match=r"neither a file nor a folder; did you mean '.*corpus\.txt'"):
        documents([str(tmp_path / "corpsu.txt")], None, print)  # at once, before anything is read
    with pytest.raises(BadInput, match="neither a file"):
        documents([str(tmp_path / "no" / "such" / "folder")], None, print)
    (tmp_path / "none").mkdir()
    with pytest.raises(BadInput, match="empty corpus"):
        read([tmp_path / "none"])
    (tmp_path / "none" / "a.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"empty corpus; for one, a\.bin was left out \(suffix\)"):
        read([tmp_path / "none"])
    with pytest.raises(BadInput, match="empty corpus"):
        read([])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("some text")
    assert [d.text for d in documents(["~/a.txt"], None, lambda _: None)] == ["some text"]
