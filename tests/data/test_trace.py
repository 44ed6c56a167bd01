"""Trace: the spans are those that brute force finds, whatever the chunks; the command says where they stand, and takes no nonsense."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pascaline import cli, tokenizer
from pascaline.data import trace
from pascaline.data.shards import Corpus, ShardWriter
from pascaline.data.trace import Span, spans
from pascaline.errors import BadInput
from pascaline.tokenizer import Tokenizer

Call = Callable[..., tuple[int, str, str]]


def build(folder: Path, documents: Sequence[Sequence[int]], vocab_size: int = 300, limit: int = 7) -> Corpus:
    with ShardWriter(folder, vocab_size, max_tokens_per_shard=limit) as writer:
        for ids in documents:
            writer.add(ids, "x")
    return Corpus(folder)


def by_force(text: Sequence[int], documents: Sequence[Sequence[int]], least: int) -> list[Span]:
    """Every common span, those that a longer one holds taken out."""
    places: dict[tuple[int, ...], list[int]] = {}
    start = 0
    for ids in documents:
        for i in range(len(ids)):
            for j in range(i + 1, min(len(ids), i + len(text)) + 1):
                places.setdefault(tuple(ids[i:j]), []).append(start + i)
        start += len(ids)
    common = [(i, j) for i in range(len(text)) for j in range(i + least, len(text) + 1) if tuple(text[i:j]) in places]
    longest = [(i, j) for i, j in common if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in common)]
    return [Span(i, j, len(rows := places[tuple(text[i:j])]), rows[: trace.FEW]) for i, j in longest]


# ---- the search


SMALL = [0, 1, 2, 65537, 65538]  # the last two are 1 and 2 to whoever drops their upper half
PARTS = st.lists(st.sampled_from([[1], [2], [1, 1, 1], [1, 2], [0, 1, 2, 1], [65537], [65538, 1, 2, 65537, 1]]), min_size=1, max_size=8)
ROWS = PARTS.map(lambda parts: [i for part in parts for i in part])


@settings(max_examples=150, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=8), ROWS, st.integers(1, 6), st.integers(1, 30), st.booleans(), st.data())
@example([[1] * 30, [2], [1] * 9], [1] * 20, 3, 7, False, None)
def test_the_spans_are_those_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    text: list[int],
    least: int,
    limit: int,
    wide: bool,
    data: Any,
) -> None:
    if not wide:
        documents, text = [[i % 65536 for i in ids] for ids in documents], [i % 65536 for i in text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        corpus = build(tmp_path_factory.mktemp("corpus"), documents, 70_000 if wide else 300, limit)
        assert corpus.dtype.itemsize == (4 if wide else 2)
        if data is not None:
            patch.setattr(trace, "CHUNK", data.draw(st.integers(1, 20)))
            patch.setattr(trace, "PAIRS", data.draw(st.integers(1, 9)))
            patch.setattr(trace, "WINDOW", data.draw(st.integers(1, 5)))
            patch.setattr(trace, "GRAM", data.draw(st.integers(1, 5)))
            patch.setattr(trace, "ODD", data.draw(st.sampled_from([trace.ODD, 0])))  # 0: all hashes are equal, none can be trusted
        assert spans(text, corpus, least) == by_force(text, documents, least)


def test_a_span_ends_with_its_document(tmp_path: Path) -> None:
    corpus = build(tmp_path, [[1, 2, 3, 4, 5], [6, 7, 8, 9], [5, 6, 7]], limit=3)  # the second shard ends inside the second document
    assert spans([9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 5], corpus, 2) == [Span(1, 6, 1, [0]), Span(5, 8, 1, [9]), Span(6, 10, 1, [5])]
    assert spans([3, 4, 5, 6], corpus, 4) == []


def test_a_span_across_chunks_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "CHUNK", 10)
    documents = [[200, *range(95), 201]] * 3
    assert spans(list(range(50)), build(tmp_path, documents, limit=40), 8) == [Span(0, 50, 3, [1, 98, 195])]


def test_a_long_text_of_one_word_is_no_square(tmp_path: Path) -> None:
    told: list[int] = []
    corpus = build(tmp_path, [[7] * 9_000, [8] * 9_000], limit=1 << 20)
    (found,) = spans([7] * 8_000, corpus, 8, told.append)
    assert found == Span(0, 8_000, 1001, [0, 1, 2])
    assert told == [18_000]


def test_the_progress_goes_up_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "CHUNK", 4)
    told: list[int] = []
    spans([1, 2], build(tmp_path, [[1] * 10]), 2, told.append)
    assert told == [4, 8, 10]


def test_nothing_to_find(tmp_path: Path) -> None:
    corpus = build(tmp_path, [[1, 2, 3], [4]])
    assert spans([], corpus, 1) == spans([1, 2], corpus, 3) == spans([2, 1], corpus, 2) == spans([9], corpus, 1) == []
    assert spans([1], corpus, 1) == [Span(0, 1, 1, [0])]
    for least in (0, -1):
        with pytest.raises(BadInput, match="at least 1"):
            spans([1], corpus, least)


# ---- the command


BOAT = "The captain of the grey harbour paints a boat, and nobody in the village remembers why he does it."
RICE = "Cook the rice in a small pot with twice as much water: été, 日本, naïve."
TEXTS = [(BOAT, "books", "boat.txt:0"), (f"{RICE}\n{BOAT} {RICE}", "web", "7"), (RICE, "web", "8"), ("unlike " * 9 + RICE, "web", "9")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first two stages of a run leave, and two folders for models. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    own = tokenizer.train([text for text, _, _ in TEXTS], 320)
    own.save(out / "02-tokenizer")
    with ShardWriter(out / "02-tokenizer" / "shards", own.vocab_size, max_tokens_per_shard=50) as writer:
        for text, source, _ in TEXTS:
            writer.add([own.begin, *own.encode(text), own.end], source)
    for folder in ("01-corpus", "model", "03-pretrain/model"):
        (out / folder).mkdir(parents=True)
    rows = [json.dumps({"text": text, "source": source, "id": name}) + "\n" for text, source, name in TEXTS]
    (out / "01-corpus" / "documents.jsonl").write_text("".join(rows))
    return out


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """(exit code, standard output, standard error) of `pascaline data trace ARGUMENTS`; stdin: what standard input holds."""

    def answer(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pascaline", "data", "trace", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return answer


def test_json_tells_the_spans_and_where_they_stand(run: Path, call: Call) -> None:
    text = f"He said: {RICE} And {BOAT}"
    code, out, err = call(run / "model", text, "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1
    told = json.loads(out)
    own, corpus = Tokenizer.load(run / "02-tokenizer"), Corpus(run / "02-tokenizer" / "shards")
    assert told["text"] == text and told["text_tokens"] == len(own.encode(text))
    assert (told["documents"], told["corpus_tokens"], told["min_tokens"]) == (4, corpus.tokens, 8)
    assert told["different_spans"] == len(told["spans"]) == 2
    rice, boat = sorted(told["spans"], key=lambda span: span["characters"])
    assert BOAT[3:] in boat["text"] and RICE[4:] in rice["text"]
    expected = by_force(own.encode(text), [corpus.document(i).tolist() for i in range(4)], 8)
    assert [(span["tokens"], span["occurrences"]) for span in (rice, boat)] == [(s.stop - s.start, s.occurrences) for s in expected]
    assert [(p["source"], p["id"], p["document"]) for p in boat["found"]] == [("books", "boat.txt:0", 0), ("web", "7", 1)]
    assert [span["tokens"] for span in told["spans"]] == sorted((boat["tokens"], rice["tokens"]), reverse=True)
    for span in told["spans"]:
        assert [text[a:b] for a, b in span["characters"]] == [span["text"]]
        for place in span["found"]:
            stands = corpus.document(place["document"])[place["offset"] :][: span["tokens"]]
            assert own.decode(stands.tolist()) == span["text"]
    assert told["covered_tokens"] == boat["tokens"] + rice["tokens"] and told["covered"] == told["covered_tokens"] / told["text_tokens"]
    assert told["covered_characters"] == sorted(boat["characters"] + rice["characters"])


def test_equal_spans_are_one_and_the_limit_counts(run: Path, call: Call) -> None:
    text = f"{BOAT}!{BOAT}!{RICE}"
    told = json.loads(call(run, text, "--json", "--limit", 1)[1])
    assert told["different_spans"] == 2 and len(told["spans"]) == 1
    assert told["spans"][0]["text"] == BOAT and told["spans"][0]["characters"] == [[0, len(BOAT)], [len(BOAT) + 1, 2 * len(BOAT) + 1]]
    tokens = told["spans"][0]["tokens"]
    for least, number in ((tokens, 1), (tokens + 1, 0)):
        told = json.loads(call(run, BOAT, "--json", "--min-tokens", least)[1])
        assert len(told["spans"]) == told["covered"] == number


def test_a_span_that_cuts_a_character_has_the_whole_ones() -> None:
    own = tokenizer.train(["a"], 263)  # a token a byte
    for text, whole in (("aé日b", [0, 1, 1, 2, 2, 2, 3, 4]), ("日\ufffd\ufffdéa", [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5])):
        ids = own.encode(text)
        assert len(ids) == len(whole) - 1
        assert trace._letters(own, ids, text, range(len(whole))) == dict(enumerate(whole))
    assert [trace._letters(own, own.encode("aé日b"), "aé日b", [cut])[cut] for cut in range(8)] == [0, 1, 1, 2, 2, 2, 3, 4]


def test_spans_that_overlap_cover_a_token_once() -> None:
    found = [Span(start, stop, 1, [0]) for start, stop in ((0, 4), (2, 6), (5, 7), (7, 9), (12, 20))]
    assert trace._united(found) == [(0, 7), (7, 9), (12, 20)]


def test_any_model_of_the_run_will_do(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "model")
    answers = {call(place, BOAT, "--json") for place in (run, run / "model", run / "03-pretrain" / "model", run / "03-pretrain", ".", "..")}
    assert len(answers) == 1


def test_people_see_the_text_with_marks_and_a_table(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call(run / "model", "-", stdin=f"\033]\rSo: {BOAT}\nxyz [bold]Z".encode())
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith("\ufffd]\ufffdSo:") and lines[0].endswith("captain of the grey harbour paints a boat, and nobody in the "
        "village remembers why he does it.\u27e7"), lines[0]  # fmt: skip
    assert lines[0].count("\u27e6") == out.count("\u27e7") == 1 and lines[1] == "xyz [bold]Z" and "\033" not in out
    assert "in the 4 documents" in out and "; 1 span:" in out
    (row,) = [line for line in lines if "books boat.txt:0, token " in line]
    assert row.split()[1] == "2" and "captain of the grey" in row
    assert any("web 7, token " in line for line in lines)


def test_on_a_terminal_the_marks_are_colours(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = call(run, f"{BOAT}##Zq")[1]
    assert f"\033[1;32m{BOAT}\033[0m##Zq" in out and "\u27e6" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"\u27e6{BOAT}\u27e7" in call(run, f"{BOAT}##Zq")[1]


def test_nothing_found_is_said(run: Path, call: Call) -> None:
    assert "spans shorter than 8 are not looked for" in call(run, "pot")[1]
    code, out, err = call(run, "zebra quiz jumps over 12345 yaks")
    assert (code, err) == (0, "") and "No 8 tokens in a row of the text's" in out and "times" not in out
    told = json.loads(call(run, "zebra quiz jumps over 12345 yaks", "--json")[1])
    assert (told["covered_tokens"], told["covered"], told["spans"], told["covered_characters"]) == (0, 0, [], [])


@pytest.mark.parametrize("damage", ["absent", "short", "other", "broken", "odd"])
def test_without_the_texts_there_are_still_numbers(damage: str, run: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "02-tokenizer").symlink_to(run / "02-tokenizer")
    if damage != "absent":
        (tmp_path / "01-corpus").mkdir()
        line = {"short": "", "other": '{"source": "old", "id": "1"}\n', "broken": "{\n", "odd": "[]\n"}[damage]
        (tmp_path / "01-corpus" / "documents.jsonl").write_text(line * 4)
    code, out, _ = call(tmp_path, BOAT, "--json")
    assert code == 0 and json.loads(out)["spans"][0]["found"][0] == {"document": 0, "source": "books", "id": None, "offset": 1}
    assert "books 0, token 1" in call(tmp_path, BOAT)[1]


def test_mistakes_are_one_sentence(run: Path, call: Call, tmp_path: Path) -> None:
    def refused(*arguments: object, stdin: bytes = b"") -> str:
        code, out, err = call(*arguments, stdin=stdin)
        assert (code, out) == (2, "") and err.startswith("pascaline: ") and err.count("\n") == 1
        return err

    assert "there is no folder" in refused(run / "modle", BOAT)
    assert "has no token shards beside it (02-tokenizer/shards)" in refused(tmp_path, BOAT)
    assert "the text is empty" in refused(run, "") and "the text is empty" in refused(run, "-")
    assert "not UTF-8" in refused(run, "-", stdin=b"\xff\xfe")
    assert "lone surrogate" in refused(run, "a\udc80b")
    assert "--limit must be at least 1" in refused(run, BOAT, "--limit", 0)
    assert "--min-tokens must be at least 1" in refused(run, BOAT, "--min-tokens", 0)
    (tmp_path / "02-tokenizer" / "shards").mkdir(parents=True)
    assert "index.json is missing" in refused(tmp_path, BOAT)


def test_ctrl_c_is_one_line(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Corpus.read

    def interrupted(self: Corpus, start: int, stop: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return read(self, start, stop)

    monkeypatch.setattr(Corpus, "read", interrupted)
    code, out, err = call(run, BOAT)
    assert (code, out) == (130, "") and "stopped while reading the token shards" in err and "Traceback" not in err


def test_a_long_scan_shows_its_progress_but_not_to_a_machine(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "LONG", 1)
    assert "trace: done" in call(run, BOAT)[2]
    assert call(run, BOAT, "--json")[2] == ""


@pytest.mark.parametrize("arguments", [["-h"], ["RUN", BOAT]])
def test_no_torch_is_needed(arguments: list[str], run: Path) -> None:
    words = ["pascaline", "data", "trace", *(str(run) if word == "RUN" else word for word in arguments)]
    heavy = {"torch", "matplotlib", "transformers"} | ({"numpy", "tokenizers"} if arguments == ["-h"] else set())
    code = (
        f"import sys; sys.argv = {words!r}\nfrom pascaline.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code\n"
        f"assert not {heavy!r} & set(sys.modules), sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_what_a_run_writes_is_what_is_read(tmp_path: Path) -> None:
    coin = Path(__file__).parent.parent / "coin.toml"
    assert forked.call(tmp_path, "run", coin, "--out", tmp_path / "run", "--stage", "tokenizer")[0] == 0
    document = json.loads((tmp_path / "run" / "01-corpus" / "documents.jsonl").read_text().splitlines()[5])
    code, out, err = forked.call(tmp_path, "data", "trace", tmp_path / "run", document["text"], "--json", "--min-tokens", 2)
    assert code == 0, err
    (span,) = json.loads(out)["spans"]
    assert span["text"] == document["text"]
    assert {"document": 5, "source": document["source"], "id": document["id"], "offset": 1} in span["found"]
