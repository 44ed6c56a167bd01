import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascaline import progress, runs
from pascaline.errors import BadInput
from pascaline.progress import Progress
from pascaline.runs import Lock, Metrics
from pascaline.stopping import Interrupt


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- whole files


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    runs.write_atomic(target, "alt")
    runs.write_atomic(target, "né\n")
    assert target.read_bytes() == "né\n".encode()
    assert names(target.parent) == {"a.txt"}
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    runs.write_json(tmp_path / "a.json", {"x": 1})

    def full(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: runs.write_json(tmp_path / "a.json", {"x": 2}),
        lambda: runs.complete(tmp_path),
        lambda: runs.lineage(tmp_path),
    ):
        with pytest.raises(OSError) as caught:
            write()
        assert runs.disk_full(caught.value)
    assert names(tmp_path) == {"a.json"}
    assert runs.read_json(tmp_path / "a.json") == {"x": 1}


LIMITED = """
import resource, signal, sys
from pascaline import runs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (110, 110))
try:
    runs.write_atomic(sys.argv[1] + "/big", b"x" * 1000)
except OSError as error:
    print(error.errno)
rows = runs.Metrics(sys.argv[1] + "/m.jsonl")
try:
    for step in range(100):
        rows.append({"step": step, "loss": 0.5})
except OSError as error:
    print(error.errno)
"""


def test_a_write_that_fails_halfway_leaves_no_half_file(tmp_path: Path) -> None:
    """The limit lets the first bytes through, as a disk does that fills up."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], check=False, capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == [str(errno.EFBIG)] * 2, done.stderr
    assert names(tmp_path) == {"m.jsonl"}
    assert (tmp_path / "m.jsonl").read_bytes().endswith(b"}\n")
    assert [row["step"] for row in Metrics.read(tmp_path / "m.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_is_whole_or_absent(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "deep" / "x"
    if there:
        target.mkdir(parents=True)
    with pytest.raises(RuntimeError), runs.atomic_folder(target) as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert names(target.parent) == ({"x"} if there else set())
    with runs.atomic_folder(target) as temporary:
        (temporary / "a").write_text("whole")
        assert not there or not names(target)
    assert names(target.parent) == {"x"} and names(target) == {"a"}
    for taken in (target, target / "a"):
        with pytest.raises(BadInput, match="exists already"), runs.atomic_folder(taken):
            pass
    assert names(target.parent) == {"x"} and names(target) == {"a"}


def test_json_form(tmp_path: Path) -> None:
    facts = {
        "z": float("nan"),
        "a": [np.float32("inf"), np.arange(2)],
        "p": Path("x/y"),
        "t": (True, None),
        3: np.int64(4),
    }
    runs.write_json(tmp_path / "a.json", facts)
    text = (tmp_path / "a.json").read_text()
    assert text.startswith('{\n "z": null') and text.endswith("}\n")
    assert json.loads(text) == {"z": None, "a": [None, [0, 1]], "p": "x/y", "t": [True, None], "3": 4}
    with pytest.raises(TypeError):
        runs.write_json(tmp_path / "b.json", {"x": object()})
    assert names(tmp_path) == {"a.json"}


def test_done(tmp_path: Path) -> None:
    assert not runs.is_complete(tmp_path) and not runs.is_complete(tmp_path / "absent")
    runs.complete(tmp_path, {"steps": 3})
    assert runs.is_complete(tmp_path) and runs.read_json(tmp_path / "done.json") == {"steps": 3}
    (tmp_path / "done.json").write_text('{"ste')
    assert not runs.is_complete(tmp_path)


# ---- lock


def test_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    code = "import sys; from pascaline.runs import Lock\nwith Lock(sys.argv[1]): print('in', flush=True); input()"
    folder = tmp_path / "runs" / "demo"
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(BadInput, match=f"{folder} is in use by process {other.pid}"), Lock(folder):
            pass
        other.kill()
        other.wait()
    left_over = folder / "03-pretrain" / f".model.1-a{runs.TEMPORARY}"
    left_over.parent.mkdir()
    left_over.write_text("torn")
    (folder / ".user.tmp").write_text("not ours")
    with Lock(folder):  # the kernel freed the killed run's lock
        assert not left_over.exists() and (folder / ".user.tmp").exists()
        with pytest.raises(BadInput, match=str(os.getpid())), Lock(folder):
            pass
    with Lock(folder):
        pass


def test_lock_on_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    for place in (tmp_path / "f", tmp_path / "f" / "sub"):
        with pytest.raises(BadInput, match="is a file"), Lock(place):
            pass


# ---- metrics


def test_metrics_reach_the_file_at_once_and_non_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "r" / "metrics.jsonl"
    assert Metrics.read(path) == []
    rows = Metrics(path)
    rows.append({"step": 1, "loss": float("nan"), "load": [[0.5, float("inf")]]})
    assert Metrics.read(path) == [{"step": 1, "loss": None, "load": [[0.5, None]]}]
    rows.sync()
    rows.close()


@given(cut=st.integers(0, 200), keep=st.integers(0, 12))
def test_kill_at_any_byte_then_resume(tmp_path_factory: pytest.TempPathFactory, cut: int, keep: int) -> None:
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    with Metrics(path) as rows:
        for step in range(1, 11):
            rows.append({"step": step, "loss": 1 / step})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] if cut else whole)
    survivors = [row["step"] for row in Metrics.read(path)]
    assert survivors == list(range(1, len(survivors) + 1))
    assert len(path.read_bytes().rstrip(b"\n")) >= len(b"\n".join(whole.split(b"\n")[: len(survivors)]).rstrip(b"\n"))
    with Metrics(path) as rows:
        if cut % 2:
            rows.truncate_after(keep)
            survivors = [step for step in survivors if step <= keep]
        rows.append({"step": 99})
    assert [row["step"] for row in Metrics.read(path)] == [*survivors, 99]


def test_broken_middle_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(BadInput, match="line 2"):
        Metrics.read(path)


# ---- lineage


def test_lineage(tmp_path: Path) -> None:
    told = runs.lineage(
        tmp_path / "02",
        parents=[tmp_path / "01", "org/model"],
        seed=7,
        tokens=5,
    )
    assert runs.read_json(tmp_path / "02" / "lineage.json") == told
    assert told["parents"] == ["../01", "org/model"]
    assert (told["seed"], told["tokens"]) == (7, 5)
    assert told["machine"]["cores"] >= 1 and told["machine"]["cpu"] and told["machine"]["memory_gib"] > 0
    assert told["versions"]["python"].startswith("3.") and set(told["versions"]) == {
        "python",
        "pascaline",
        "torch",
        "transformers",
        "tokenizers",
    }
    assert told["commit"] is None or len(told["commit"].removesuffix("-dirty")) == 40


def test_commit_is_this_source_tree_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True).stdout

    source = tmp_path / "runs.py"
    source.write_text("1")
    monkeypatch.setattr(runs, "__file__", str(source))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    with monkeypatch.context() as clean:
        clean.delenv("GIT_DIR")
        git("init", "-q")
        git("commit", "-q", "--allow-empty", "-m", "x")
        assert runs.git_commit() is None  # in a repository that does not track it: some user's, not ours
        git("add", "runs.py")
        git("commit", "-q", "-m", "y")
        head = git("rev-parse", "HEAD").strip()
    assert runs.git_commit() == head
    source.write_text("2")
    assert runs.git_commit() == head + "-dirty"


def test_light_imports() -> None:
    code = "import sys, pascaline.runs, pascaline.progress; assert not {'torch', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


# ---- stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_flag(number: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    with Interrupt() as outer, Interrupt() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # `timeout` sends it twice
        assert stop.requested and outer.requested
        time.sleep(0.15)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (
        signal.default_int_handler,
        before[1],
    )
    signal.signal(signal.SIGINT, before[0])


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    found: list[bool] = []

    def body() -> None:
        with Interrupt() as stop:
            stop.request()
            found.append(stop.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [True]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested
    signal.signal(signal.SIGINT, before)


def test_a_forked_worker_still_dies_of_a_signal() -> None:
    with Interrupt() as stop:
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b"x")  # a signal that comes before Python has finished the fork is lost
            time.sleep(10)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        assert not stop.requested


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_few_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = fake_clock(monkeypatch), io.StringIO()
    with Progress("rl", 1000, file=file) as line:
        for step in range(1, 1001):
            now[0] += 0.5
            line.update(step, reward=0.1234, tokens_per_s=12345.0, expert_load=[[1]], loss=None)
    lines = file.getvalue().splitlines()
    assert lines[0] == "rl: 1000 steps"
    assert lines[1] == "rl: 100/1000 steps  50 s  ETA 7:30  reward 0.123  tokens/s 12.3k"
    assert lines[-1] == "rl: done, 1000/1000 steps  8:20  reward 0.123  tokens/s 12.3k"
    assert len(lines) == 2 + 9


def test_resume_stop_and_unknown_total(monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = fake_clock(monkeypatch), io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress("sft", 100, file=file) as line:
        for step in range(51, 60):
            now[0] += 2
            line.update(step)
        raise KeyboardInterrupt
    assert "ETA 1:38" in file.getvalue().splitlines()[1]  # 2 s a step since the resume, not 51 steps in 4 s
    assert file.getvalue().endswith("sft: stopped, 59/100 steps  18 s\n")
    file = io.StringIO()
    with Progress("corpus", unit="document", file=file) as line:
        line.update(7)
    assert file.getvalue() == "corpus: 0 documents\ncorpus: done, 7 documents  0.0 s\n"
    with Progress("x", 3, file=file, enabled=False) as line:
        line.update(3)
    assert "x" not in file.getvalue()


@pytest.mark.parametrize("width", [16, 40, 60, 80, 120])
def test_the_live_block_fits_and_shows_everything(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    now, line = fake_clock(monkeypatch), Progress("pretrain", 10, file=Terminal())
    facts = {"loss": 3.21, "tokens_per_s": 12345.0, "gemm_share": 0.4167, "grad_norm": 0.52, "max_violation": 0.31, "dead_experts": 0}
    with line:
        for step in range(1, 5):
            now[0] += 2
            line.update(step, **facts, expert_load=[[1.0]], **{"loss spike": 2})
        console = Console(file=io.StringIO(), width=width)
        console.print(line._block(width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(text) <= width for text in lines) and (len(lines) <= 4 or width < 60)
    if width >= 40:
        assert lines[0].startswith("pretrain ") and lines[0].split()[-7:] == ["4/10", "steps", "8.0", "s", "ETA", "12", "s"]
        assert ("━" in lines[0]) == (width >= 60)
        facts_shown = "  ".join(lines[1:]).split("  ")
        assert [text.strip() for text in facts_shown if text.strip()] == [
            "loss 3.21", "tokens/s 12.3k", "GEMM share 41.7%", "grad norm 0.52", "max violation 0.31", "dead experts 0", "loss spike 2",
        ]  # fmt: skip


def test_facts_do_not_dance(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Progress("x", 9, file=io.StringIO())
    line.facts = {"loss": 10.25, "grad_norm": 0.123}
    before = line._lines(80)[0].index("grad")
    line.facts = {"loss": 9, "grad_norm": 0.123}
    assert line._lines(80)[0].index("grad") == before


def test_ctrl_c_is_answered_inside_the_block() -> None:
    from pascaline.stopping import WISH

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt() as stop, Progress("rl", 3, file=Terminal()) as line:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and WISH in str([getattr(part, "plain", "") for part in line._block(80).renderables])
    with Progress("rl", 3, file=Terminal()) as line:  # the next one begins without
        assert WISH not in str([getattr(part, "plain", "") for part in line._block(80).renderables])
    signal.signal(signal.SIGINT, before)


def test_live_line_is_cheap_and_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    file = Terminal()
    with Progress("pre[train]", 5000, file=file) as line:
        start = time.perf_counter()
        for step in range(1, 5001):
            line.update(step, loss=1.5)
        spent = time.perf_counter() - start
        print("for a pipe")
    assert spent < 0.5
    assert "pre[train]" in file.getvalue() and "5000/5000 steps  " in file.getvalue() and "loss 1.5" in file.getvalue()
    assert capsys.readouterr().out == "for a pipe\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (12345, "12.3k"),
        (0.01234, "0.0123"),
        (4.5e6, "4.5M"),
        (1234.5, "1234"),
        (9999, "9999"),
        (1e15, "1e+03T"),
        ("ok", "ok"),
    ],
)
def test_numbers(value: object, text: str) -> None:
    assert progress.number(value) == text
