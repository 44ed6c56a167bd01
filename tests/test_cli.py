"""The command line: a mistake is one sentence and exit code 2, Ctrl-C is 130, --json is one object, a chat can be held."""

import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign
import forked
import pytest

from pascaline import chat, cli
from pascaline.engine import Sampling
from pascaline.runs import Lock
from pascaline.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TINY, COIN = ROOT / "recipes" / "tiny.toml", ROOT / "tests" / "coin.toml"
PROGRAM = Path(sys.executable).parent / "pascaline"
Refused = Callable[..., str]


def program(*arguments: object, **more: Any) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [PROGRAM, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment, **more)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Calls the command line, which must end with this code and one line on standard error; gives the line."""

    def call(*arguments: object, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["pascaline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said, err = capsys.readouterr()
        assert (caught.value.code, said) == (code, ""), err
        assert err.startswith("pascaline: ") and err.count("\n") == 1 and err.endswith("\n") and len(err) < 500
        return err.removeprefix("pascaline: ").strip()

    return call


# ---- light


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["run", "--help"],
        ["chat", "-h"],
        ["report", "--help"],
        ["bench", "--help"],
        ["data", "build", "-h"],
        ["verify", "check", "-h"],
        ["import", "-h"],
        ["export", "-h"],
    ],
)
def test_help_answers_without_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['pascaline', *{arguments!r}]\nfrom pascaline.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'transformers', 'tokenizers'} & set(sys.modules), sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: pascaline" in done.stdout + done.stderr and "Traceback" not in done.stderr


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "rl.stpes=5"], "rl.stpes is not a known key; did you mean 'steps'?"),
        (["--set", "model.num_experts_per_tok=9"], "num_experts_per_tok 9 is more than"),
        (["--set", 'corpus.sources=["/nowhere"]'], "corpus source '/nowhere' is neither a file nor a folder"),
        (
            ["--stage", "pretrian"],
            "there is no stage 'pretrian', only corpus, tokenizer, pretrain, sft, rl, eval; did you mean 'pretrain'?",
        ),
    ],
)
def test_the_real_program(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = program("run", TINY, "--out", tmp_path / "run", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pascaline: ") and done.stderr.count("\n") == 1 and words in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sed=1", "did you mean 'seed'?"),
        ("pretrain.lr=fast", "pretrain.lr = 'fast' is wrong"),
        ("rl.samples=1", "greater than or equal to 2"),
        ("ledger.price=-1", "greater than or equal to 0"),
        ("ledger.wats=60", "did you mean 'watts'?"),
        ("puzzles.countdown.tracs=5", "did you mean 'traces'?"),
        ("puzzles.countdown.dials.numbrs=3", "did you mean 'numbers'?"),
        ("puzzles.countdown.quality.plantd=0.3", "did you mean 'planted'?"),
        ("puzzles.chian.traces=5", "no puzzle 'chian'; did you mean 'chain'?"),
        ('rl.puzzles=["sudoku"]', "rl.puzzles = ['sudoku']"),
        ("model.qk_rope_head_dim=5", "must be even"),
        ("model.hiden_size=64", "model.hiden_size is not a known key; did you mean 'hidden_size'?"),
        ("model.vocab_size=400", "tokenizer.vocab_size"),
        ("tokenizer.vocab_size=200", "smaller than the byte alphabet"),
        ("device=nvidia", "device 'nvidia' is unknown"),
        ("device=cuda:7", "device 'cuda:7' is missing"),
        ("rl.steps", "--set 'rl.steps' must look like rl.steps=50."),
        ("=5", "must look like"),
    ],
)
def test_a_mistake_in_a_setting_writes_nothing(setting: str, words: str, refused: Refused, tmp_path: Path) -> None:
    assert words in refused("run", TINY, "--out", tmp_path / "runs" / "x", "--set", setting)
    assert not list(tmp_path.rglob("*")) or [p.name for p in tmp_path.rglob("*")] == ["runs"]


def test_a_mistake_in_the_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("seed = \n")
    assert "mine.toml is not valid TOML" in refused("run", tmp_path / "mine.toml", "--out", tmp_path / "run")
    assert "did you mean 'mine.toml'?" in refused("run", tmp_path / "mime.toml", "--out", tmp_path / "run")
    assert "must be a TOML text file" in refused("run", tmp_path, "--out", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    setting = f'corpus.sources=["{tmp_path}/empty"]'
    assert "give an empty corpus" in refused("run", TINY, "--out", tmp_path / "run", "--set", setting)
    assert {p.name for p in tmp_path.iterdir()} == {"mine.toml", "empty"}


def test_a_sink_that_is_not_installed_is_refused_before_anything_starts(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    said = refused("run", TINY, "--out", tmp_path / "run", "--set", 'sinks=["wandb"]')
    assert "sinks: wandb is not installed" in said and "pip install wandb" in said and "pascaline[watch]" in said
    assert "should be 'tensorboard', 'wandb' or 'trackio'" in refused("run", TINY, "--out", tmp_path / "run", "--set", 'sinks=["wand"]')
    assert not list(tmp_path.iterdir())
    (tmp_path / "trackio").mkdir()  # the folder that such a tool leaves is not the tool
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert "sinks: trackio is not installed" in refused("run", TINY, "--out", tmp_path / "run", "--set", 'sinks=["trackio"]')


def test_folders_that_are_no_run(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in ([], ["--fresh"]):
        assert "is not empty and not a run" in refused("run", TINY, "--out", tmp_path, *fresh)
        assert "is a file" in refused("run", TINY, "--out", tmp_path / "thesis.txt", *fresh)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"] and not tmp_path.with_name(tmp_path.name + ".old-1").exists()


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    with Lock(tmp_path / "run"):
        done = program("run", TINY, "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"is in use by process {os.getpid()}" in done.stderr


def test_reports_and_benchmarks_that_are_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "there is no folder" in refused("report", tmp_path / "nowhere")
    assert "nothing to report yet" in refused("report", tmp_path)
    assert "bench" in refused("bench", "dekode")


def test_ctrl_c_outside_of_a_step_is_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pascaline.post.chain.run", interrupted)
    assert refused("run", TINY, code=130) == "stopped; the same command goes on from what was saved."


def test_errors_of_the_system_are_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Callable[..., None]:
        def run(*_: Any, **__: Any) -> None:
            raise error

        return run

    for error, words in [
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: permission denied."),
        (OSError(5, "Input/output error"), "Input/output error."),
        (OSError(122, "Disk quota exceeded", "/x"), "no space left on the device while writing /x"),
    ]:
        monkeypatch.setattr("pascaline.post.chain.run", fails(error))
        assert words in refused("run", TINY)
    monkeypatch.setattr("pascaline.post.chain.run", fails(ZeroDivisionError("a bug")))
    monkeypatch.setattr(sys, "argv", ["pascaline", "run", str(TINY)])
    with pytest.raises(ZeroDivisionError):  # a bug of ours is not dressed up as the user's mistake
        cli.main()


# ---- json


def test_json(tiny_run: Path, coin_run: Path, tmp_path: Path) -> None:
    told = json.loads((tiny_run / "report.json").read_text())
    done = program("report", tiny_run, "--json")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1 and json.loads(done.stdout) == told
    code, out, err = forked.call(tmp_path, "run", TINY, "--out", tiny_run, "--set", "dtype=float32", "--json")
    assert (code, err) == (0, "") and out.count("\n") == 1 and json.loads(out) == told
    code, out, err = forked.call(tmp_path, "run", COIN, "--out", tmp_path / "run", "--stage", "tokenizer", "--json")
    assert (code, out, err) == (0, "{}\n", "")
    code, out, err = forked.call(tmp_path, "doctor", "--json")
    assert code == 0 and {"machine", "versions", "device", "dtype"} <= set(json.loads(out.splitlines()[-1]))


def test_the_report_shows_the_stages_the_examples_and_what_to_do_next(tiny_run: Path) -> None:
    done = program("report", tiny_run)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    for name in ("corpus", "tokenizer", "pretrain", "sft", "rl", "eval"):
        assert any(line.startswith(name + " ") for line in lines)
    assert sum(line.startswith("Held-out problem") for line in lines) == 3
    assert sum(line.startswith("  sft [") for line in lines) == sum(line.startswith("  rl [") for line in lines) == 3
    following = [line.strip() for line in lines[lines.index("Go on with:") + 1 :]]
    commands, wanted = [line.split(" ", 1) for line in following[:3]], [f"chat {tiny_run}/model", f"report {tiny_run}", "run "]
    for (command, words), start in zip(commands, wanted, strict=True):
        assert Path(shutil.which(command) or command).is_file() and words.startswith(start)  # as typed, it runs
    assert str(tiny_run / "report.html") in done.stdout


# ---- chat


def test_a_conversation_through_a_pipe(coin_run: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    questions.write_bytes(b"Coin 12?\n\n\xff\xfe broken\n" + b"z" * 5000 + b"\nCoin 77?")
    code, out, err = forked.call(tmp_path, "chat", coin_run / "model", "--max-tokens", 24, stdin=str(questions))
    assert code == 0 and err.count("\n") == 1 and err.startswith("pascaline: a prompt of 5004 tokens"), err
    blocks = out.splitlines()
    assert blocks[:1] == ["toss"] and blocks[1] in list("0123456789") and blocks[-2] == "toss" and blocks[-1] in list("0123456789")
    assert "\033" not in out


def test_the_first_answer_of_a_chat_is_the_engines(coin_run: Path, tmp_path: Path) -> None:
    from pascaline.engine import Engine

    (tmp_path / "questions").write_text("Coin 5?\n")
    code, out, _ = forked.call(tmp_path, "chat", coin_run / "model", "--temperature", 0, stdin=str(tmp_path / "questions"))
    said = Engine(coin_run / "model").generate(["Coin 5?"], Sampling(temperature=0))[0][0]
    assert code == 0 and out == f"{said.reasoning}\n{said.text}\n"


def test_history_is_seen_and_forgotten_when_it_does_not_fit(coin_run: Path, tmp_path: Path) -> None:
    (tmp_path / "questions").write_text("Coin 5?\n" * 60)
    _, out, err = forked.call(tmp_path, "chat", coin_run / "model", "--history", "--max-tokens", 24, stdin=str(tmp_path / "questions"))
    forgotten = err.count("The earlier turns are forgotten now.\n")
    assert 1 <= forgotten <= 5 and err.count("\n") == forgotten and err.count("pascaline: a prompt of") == forgotten
    assert out.count("toss\n") + forgotten == 60


def test_on_a_terminal_the_thought_is_dimmed(coin_run: Path, tmp_path: Path) -> None:
    main, other = os.openpty()
    running = forked.start(tmp_path, "chat", coin_run / "model", "--temperature", 0, terminal=os.ttyname(other))
    seen = _read_until(main)
    os.write(main, b"Coin 5?\n")
    seen += _read_until(main)
    os.write(main, b"\x04")
    assert running.wait()[0] == 0
    os.close(other)
    os.close(main)
    assert b"Ctrl-D ends" in seen and b"\x1b[2mtoss\x1b[0m\r\n" in seen
    assert seen.split(b"\x1b[0m\r\n")[1][:1] in [b"%d" % i for i in range(10)]


def _read_until(terminal: int) -> bytes:
    """What appears on the terminal up to the next prompt."""
    seen, deadline = b"", time.monotonic() + 60
    while b"\n> " not in seen:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(terminal, 4096)
    return seen


def test_models_that_cannot_be_talked_to(coin_run: Path, tmp_path: Path, refused: Refused) -> None:
    assert f"did you mean '{coin_run / 'model'}'?" in refused("chat", coin_run)
    assert "has no config.json" in refused("chat", tmp_path) and "has no config.json" in refused("chat", tmp_path / "nowhere")
    shutil.copytree(coin_run / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "model.safetensors is truncated" in refused("chat", tmp_path / "model")
    weights.write_bytes(b"")
    assert "model.safetensors is truncated" in refused("chat", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    assert "is not valid JSON" in refused("chat", tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    assert "has no config.json" in refused("chat", tmp_path / "model")
    assert "temperature = -1.0 is out of range" in refused("chat", coin_run / "model", "--temperature", -1)
    assert "device 'cuda:7' is missing" in refused("chat", coin_run / "model", "--device", "cuda:7")


class Scripted:
    """An engine whose next answer is given."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        self.tokenizer, self.ids = tokenizer, ids

    def stream(self, *_: Any) -> Iterator[int]:
        yield from self.ids


def test_broken_characters_and_control_codes_are_shown_as_such(coin_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Tokenizer.load(coin_run / "model")
    whole = [i for letter in "é日" for i in own.encode(letter)]
    assert len(whole) == 5  # a token a byte: the corpus has none of these
    assert chat._answer(Scripted(own, [*whole, own.unthink, *whole[:2], own.end]), [], None) == "é"
    assert capsys.readouterr().out == "é日\né\n"
    chat._answer(Scripted(own, [*whole[:-1], own.unthink, *own.encode("a\033[2J\rb"), *whole[:1], own.end]), [], None)
    said = capsys.readouterr().out
    assert said.startswith("é\ufffd") and said.endswith("\na\ufffd[2J\ufffdb\ufffd\n") and "\033" not in said
    chat._answer(Scripted(own, own.encode("never closed")), [], None)
    assert capsys.readouterr().out == "never closed\n(the thought was cut off at the token limit)\n"
    assert chat._answer(Scripted(own, [own.unthink, own.unthink, *own.encode("4"), own.end]), [], None) == "4"
    assert capsys.readouterr().out == "\n4\n"


def test_tags_that_are_plain_text_are_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Tokenizer.load(foreign.write(tmp_path, "qwen2"))
    turns = [{"role": "user", "content": "?"}]
    letters = [i for letter in "<think>\na < b, then\n</think>\n\nx<y" for i in own.encode(letter)]
    assert chat._answer(Scripted(own, letters), turns, None) == "x<y"
    assert capsys.readouterr().out == "a < b, then\nx<y\n"
    assert chat._answer(Scripted(own, own.encode("plain")), turns, None) == "plain"
    assert capsys.readouterr().out == "plain\n"


def test_it_is_quick_to_say_what_is_wrong() -> None:
    began = time.perf_counter()
    assert program("run", "nowhere.toml").returncode == 2
    assert time.perf_counter() - began < 5


# ---- corpora


def test_data_build_tells_what_it_kept_and_the_chain_goes_on_from_it(tmp_path: Path) -> None:
    texts = ["The river of the garden has to be crossed with a boat.", "The river  of the garden has to be crossed with a boat.", "m" * 300]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = [f'corpus.sources=["{tmp_path / "web.jsonl"}"]', "corpus.dedup=exact", "corpus.filters={runs={}}"]
    command = ["data", "build", TINY, "--out", tmp_path / "run", *(a for setting in settings for a in ("--set", setting))]
    done = program(*command)
    assert done.returncode == 0, done.stderr
    assert "| 1 | 54 |" in done.stdout and "| duplicate | 1 | 33.3% |" in done.stdout and "| runs.max_run | 1 | 33.3% |" in done.stdout
    found = [json.loads(line)["filter"] for line in (tmp_path / "run" / "01-corpus" / "excluded.jsonl").read_text().splitlines()]
    assert sorted(found) == ["duplicate", "runs.max_run"]
    assert list((tmp_path / "run" / "02-tokenizer" / "shards").glob("*.bin")) and not (tmp_path / "run" / "03-pretrain").exists()
    before = (tmp_path / "run" / "02-tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert "| duplicate |" in program(*command).stdout  # told again, not done again
    assert (tmp_path / "run" / "02-tokenizer" / "tokenizer.json").stat().st_mtime_ns == before


def test_a_corpus_of_which_nothing_is_left_says_why(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "web.jsonl").write_text(json.dumps({"text": "m" * 300}) + "\n")
    settings = [
        f'corpus.sources=["{tmp_path / "web.jsonl"}"]',
        "corpus.filters={runs={}}",
        "puzzles.countdown.traces=0",
        "puzzles.chain.traces=0",
    ]
    said = refused("run", TINY, "--json", "--out", tmp_path / "run", *(a for setting in settings for a in ("--set", setting)))
    assert "nothing is left of the corpus: runs.max_run (1)" in said and "excluded.jsonl" in said
    assert (tmp_path / "run" / "01-corpus" / "excluded.jsonl").stat().st_size > 0
