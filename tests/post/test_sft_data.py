"""sft on files of chats: what is read, what is left out and said, and how long it trains."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_start import recipe
from tiny import tiny_folder, tiny_model

import pascaline
from pascaline.data.batch import batches
from pascaline.data.chats import Chat, ChatSamples, documents, gather, read
from pascaline.data.loader import Loader
from pascaline.errors import BadInput
from pascaline.post import sft
from pascaline.post.check import check
from pascaline.post.stage import Run
from pascaline.recipe import load, parse
from pascaline.runs import Metrics, read_json
from pascaline.tables import Sft
from pascaline.tokenizer import Tokenizer
from pascaline.train.losses import Loss, compute, totals

TESTS = Path(__file__).parent.parent


def chat(asked: str, answer: str, **message: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **message}]}


def put(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = [chat(f"Say {i}", f"{i}", thinking="t" * (i % 9)) for i in range(24)]
BAD = [chat("long", "x" * 80), {"messages": [{"role": "user", "content": "no answer"}]}, chat("longer", "y" * 90)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("start"))


def settings(data: Path, **more: Any) -> dict[str, Any]:
    own = {"data": [str(data)], "examples": False, "epochs": 1.0, "tokens_per_step": 128, "save_every": 2}
    return {f"sft.{key}": value for key, value in (own | more).items()}


def tune(tmp_path: Path, start: Path, data: Path, quiet: bool = True, **more: Any) -> dict[str, Any]:
    """Run a chain up to sft; what data.json tells."""
    pascaline.run(recipe(tmp_path, start), tmp_path / "out", settings(data, **more), stage="sft", quiet=quiet)
    return read_json(tmp_path / "out" / "02-sft" / "data.json") or {}


def test_what_is_left_out_is_counted_named_and_said(start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = put(tmp_path / "chats.jsonl", *GOOD[:12], *BAD, *GOOD[12:])
    found = tune(tmp_path, start, data, quiet=False)
    assert found["chats"] == found["documents"] == 24 and found["left_out"]["nothing_to_learn"] == [f"{data}:14"]
    assert list(found["left_out"]["too_long"]) == [f"{data}:13", f"{data}:15"] and min(found["left_out"]["too_long"].values()) > 80
    tokenizer = Tokenizer.load(start)
    samples = [sample for c in read(data) for sample in documents(c, tokenizer, ["assistant"]) if len(sample.tokens) <= 64]
    assert found["tokens"] == sum(len(s.tokens) for s in samples) and found["learnt"] == sum(int(s.streams["ce"].sum()) for s in samples)
    told = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    longest = max(found["left_out"]["too_long"].values())
    assert told == [
        f"sft: 3 of 27 chats are left out: 2 of more than sft.sequence_length = 64 tokens (the longest has {longest}), "
        "1 without a token of sft.roles = assistant; 02-sft/data.json names them"
    ]
    assert (tmp_path / "out" / "02-sft" / "model" / "model.safetensors").exists()


def test_when_nothing_is_left_that_is_an_error(start: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"sft: no chat is left to learn from: 2 of more than .*, 1 without a token of"):
        tune(tmp_path, start, put(tmp_path / "chats.jsonl", *BAD))
    assert not (tmp_path / "out" / "02-sft" / "done.json").exists()


def test_a_chat_that_cannot_be_asked_is_an_error_and_no_empty_mask(start: Path, tmp_path: Path) -> None:
    strange = {"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}
    data = put(tmp_path / "chats.jsonl", *GOOD, {**strange, "messages": [*strange["messages"], chat("c", "d")["messages"][1]]})
    with pytest.raises(BadInput, match=rf"{data}:25: the chat template refuses these messages: unknown role: bot"):
        tune(tmp_path, start, data)


def test_a_stage_goes_on_with_its_own_chats_only(start: Path, tmp_path: Path) -> None:
    data = put(tmp_path / "chats.jsonl", *GOOD)
    first = tune(tmp_path, start, data)
    stage = tmp_path / "out" / "02-sft"
    before = (stage / "model" / "model.safetensors").read_bytes()
    (stage / "done.json").unlink()  # as if it had been killed
    put(data, *GOOD[:-1])
    with pytest.raises(BadInput, match="sft was begun with other chats than its files hold now"):
        tune(tmp_path, start, data)
    assert read_json(stage / "data.json") == first
    put(data, *GOOD)
    assert tune(tmp_path, start, data) == first and (stage / "model" / "model.safetensors").read_bytes() == before


def test_two_ranks_learn_what_one_learns(start: Path, tmp_path: Path) -> None:
    data = put(tmp_path / "chats.jsonl", *GOOD, *BAD)
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir(), both.mkdir()
    expected = tune(alone, start, data, epochs=2.0)
    given = [word for key, value in settings(data, epochs=2.0).items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pascaline", "run"]
    command += [str(recipe(both, start)), "--out", str(both / "out"), "--stage", "sft", *given]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 of 27 chats are left out") == 1 and read_json(both / "out" / "02-sft" / "data.json") == expected
    rows, others = (Metrics.read(folder / "out" / "02-sft" / "metrics.jsonl") for folder in (alone, both))
    assert len(rows) == len(others) and [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in others], abs=1e-4)


# ---- budgets ---------------------------------------------------------------------------------------------------------


def samples(lengths: list[int], tokenizer: Tokenizer) -> ChatSamples:
    overhead = len(documents(Chat(chat("", "")["messages"], ""), tokenizer, ["assistant"])[0].tokens)
    chats = (Chat(chat("", "x" * (n - overhead))["messages"], str(i)) for i, n in enumerate(lengths))
    return gather(chats, tokenizer, ["assistant"], 1000)


@pytest.mark.parametrize(
    "lengths, settings, expected",
    [
        ([40] * 7, {"epochs": 1.0}, 4),  # 7 rows of 64, two a step: by their tokens alone it would be 2
        ([40] * 7, {"epochs": 2.0}, 7),
        ([40] * 7, {"epochs": 0.5}, 2),
        ([40] * 7, {"epochs": 1.5}, 6),
        ([32] * 8, {"epochs": 3.0}, 6),
        ([40] * 7, {"epochs": 9.0, "tokens": 300}, 3),
        ([40], {"epochs": 0.001}, 1),
    ],
)
def test_budgets_count_rows(lengths: list[int], settings: dict[str, Any], expected: int, start: Path) -> None:
    rows = Loader(samples(lengths, Tokenizer.load(start)), 64, 2, 2, 0, seed=1)
    assert sft.steps(Sft(**settings), rows) == expected


def test_an_epoch_reads_every_chat_once(start: Path) -> None:
    found = samples([40, 41, 42, 43, 20, 21, 22, 63, 64, 12], Tokenizer.load(start))
    rows = Loader(found, 64, 1, 1, 0, seed=1)
    seen = [name["chat"] for step in range(sft.steps(Sft(), rows)) for part in rows.documents(step) for name in part.values()]
    assert sorted(seen) == sorted(found.names)


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_packing_changes_no_loss_and_no_gradient(start: Path) -> None:
    """trl 3728: packing switched the mask off without a word."""
    tokenizer = Tokenizer.load(start)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    found = [
        sample
        for i in range(6)
        for sample in documents(
            Chat(chat("abc " * i, "the cat", reasoning_content="x" * i)["messages"] + chat("so", "12")["messages"], ""),
            tokenizer,
            ["assistant"],
        )
    ]
    losses, gradients = [], []
    for packed in (batches(found, 128, 2, tokenizer.pad), [b for s in found for b in batches([s], len(s.tokens), 1, tokenizer.pad)]):
        total = totals(packed)
        assert total["ce"] == sum(float(s.streams["ce"].sum()) for s in found)
        model.zero_grad()
        loss = torch.stack([compute(model, batch, total, Loss())[0] for batch in packed]).sum()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(*gradients, atol=1e-5)


# ---- where chats come from --------------------------------------------------------------------------------------------


def test_data_may_be_an_earlier_stages_chats(tmp_path: Path) -> None:
    raw = {"chain": ["sft", "reject", "sft-restart"], "sft-restart": {"start": "sft", "data": ["reject"]}}
    recipe = parse({**raw, "reject": {}, "puzzles": {"countdown": {"examples": 2}}}, "")
    run = Run(recipe, tmp_path, torch.device("cpu"), torch.float32)
    run.folder("reject").mkdir()
    put(run.folder("reject") / "chats.jsonl", {**GOOD[3], "puzzle": "countdown", "key": "k", "rate": 0.5})
    found = list(sft._chats(run, "sft-restart"))
    assert [c.name.rpartition("/")[2] for c in found] == ["chats.jsonl:1", "puzzle:countdown:0", "puzzle:countdown:1"]
    assert found[0].messages[1] == {"role": "assistant", "content": "3", "reasoning_content": "ttt"}
    assert [c.messages[1]["role"] for c in found] == ["assistant"] * 3


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"sft.data": ["nowhere.jsonl"]}, "sft.data: there is no file 'nowhere.jsonl', and no earlier stage of that name"),
        ({"sft.data": ["rl"]}, "sft.data: 'rl' is no earlier stage that writes chats"),
        ({"sft.examples": False}, "sft has nothing to learn from: .* or name files in sft.data"),
        ({"sft.roles": []}, "sft.roles"),
        ({"sft.roles": ["asistant"]}, "sft.roles.*'assistant', 'user'"),
    ],
)
def test_what_cannot_work_is_said_at_once(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        check(load(TESTS / "coin.toml", changes))


def test_a_bad_line_is_found_before_anything_is_trained(start: Path, tmp_path: Path) -> None:
    data = put(tmp_path / "chats.jsonl", *GOOD, {"prompt": "a"})
    with pytest.raises(BadInput, match=rf"{data}:25 needs messages, or prompt and completion, and has prompt"):
        tune(tmp_path, start, data)
    assert not (tmp_path / "out").exists()


def test_reports_stand_behind_the_chats(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sft.confessions: chats that end with a report, of which nothing but the report is learnt."""
    seen: list[Loader] = []

    def caught(run: Run, name: str, model: Any, rows: Loader, *rest: Any) -> dict[str, Any]:
        seen.append(rows)
        raise BadInput("seen enough")

    monkeypatch.setattr(sft, "train", caught)
    given = settings(put(tmp_path / "chats.jsonl", *GOOD)) | {"sft.confessions": 0.5, "sft.sequence_length": 256}
    with pytest.raises(BadInput, match="seen enough"):
        pascaline.run(recipe(tmp_path, start), tmp_path / "out", given, stage="sft", quiet=True)
    all_of_them, own = seen[0].samples, Tokenizer.load(start)
    texts = [own.decode(all_of_them.get(i).tokens.tolist()) for i in range(len(all_of_them.lengths))]
    reports = [i for i, text in enumerate(texts) if "Is your answer right?" in text]
    assert reports and reports == list(range(24, len(texts)))
    said = set()
    for i in reports:
        sample = all_of_them.get(i)
        said.add(own.decode(sample.tokens[sample.streams["ce"] > 0].tolist()))
        assert all_of_them.name(i) == {"sample": i - 24}
    assert said == {"yes", "no"}
