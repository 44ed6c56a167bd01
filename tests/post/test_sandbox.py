"""Programs that try to use more than they may, in each of the ways to shut them in that this machine permits."""

import contextlib
import multiprocessing
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from pascaline.errors import BadInput
from pascaline.post.verifiers import sandbox
from pascaline.post.verifiers.sandbox import Limits, Ran, protections, run, run_many

QUICK = Limits(cpu=1, wall=1.0, memory=128 << 20, file_size=1 << 20, open_files=32, processes=8, output=100_000)
SLOW = Limits(cpu=20, wall=60.0)  # for what must end by itself, however loaded the machine is


@pytest.fixture(params=["spaces", "nobody", "bare"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The sandbox's three strengths; "nobody" needs an interpreter that others may read."""
    if request.param == "nobody" and os.path.exists("/usr/bin/python3.11"):
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3.11")
    try:
        ran, _ = sandbox._run("print(1)", "", SLOW, request.param)
    except OSError as error:
        pytest.skip(f"{request.param}: {error}")
    if ran.stdout != "1\n":
        pytest.skip(f"{request.param} does not work here: {ran.stderr}")
    monkeypatch.setattr(sandbox, "_mode", lambda: request.param)
    return request.param


SPACES = pytest.mark.skipif(not protections()["files"], reason="this machine permits no namespaces, as the documentation says")


def only(mode: str, *modes: str) -> None:
    if mode not in modes:
        pytest.skip(f"not protected from in mode {mode}, as the documentation says")


def last(ran: Ran) -> str:
    return ran.stderr.strip().rpartition("\n")[2]


def test_a_program_reads_its_input_and_gives_its_output_and_status(mode: str) -> None:
    ran = run("import sys; print(sys.stdin.read()[::-1]); print('é', file=sys.stderr); sys.exit(3)", "äbc", SLOW)
    assert (ran.stdout, ran.stderr, ran.status, ran.ended) == ("cbä\n", "é\n", 3, "exit")


def test_input_and_output_larger_than_any_pipe_pass_whole() -> None:
    text = "0123456789abcde\n" * 50_000
    assert run("import sys; sys.stdout.write(sys.stdin.read())", text, SLOW).stdout == text
    assert run("print('done')", text, SLOW).stdout == "done\n"  # which reads none of it


def test_a_loop_ends_at_its_cpu_limit() -> None:
    ran = run("while True: pass", "", Limits(cpu=1, wall=60))
    assert ran.ended == "cpu" and 0.5 < ran.seconds < 10


def test_a_loop_that_ignores_the_signal_ends_too() -> None:
    assert run("import signal; signal.signal(signal.SIGXCPU, lambda *_: None)\nwhile True: pass", "", Limits(cpu=1, wall=60)).ended == "cpu"


def test_loops_of_many_processes_count_together() -> None:
    ran = run("import os\nfor _ in range(3): os.fork()\nwhile True: pass", "", Limits(cpu=1, wall=1.5))
    assert ran.ended == "cpu"


def test_a_sleeper_ends_at_the_wall_clock_by_its_own_fault() -> None:
    ran = run("import time; time.sleep(60)", "", QUICK)
    assert ran.ended == "wall" and ran.status is None and ran.seconds >= 1.0


def test_a_memory_hog_gets_a_memory_error(mode: str) -> None:
    ran = run("x = bytearray(300 << 20); print(len(x))", "", QUICK)
    assert ran.stdout == "" and ran.status == 1 and last(ran) == "MemoryError"


def test_a_fork_bomb_is_bounded(mode: str) -> None:
    only(mode, *(["spaces", "nobody"] if protections()["count"] else []))
    bomb = """
import os, time
made = 0
try:
    while made < 100:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
except OSError as error:
    print(made, type(error).__name__, flush=True)
"""
    ran = run(bomb, "", QUICK)
    made, _, why = ran.stdout.partition(" ")
    assert why == "BlockingIOError\n" and 1 <= int(made) <= 8 and ran.ended == "exit"


@pytest.mark.skipif(not protections()["count"], reason="this machine counts the processes of all programs together")
def test_one_fork_bomb_takes_nothing_from_another_program() -> None:
    bomb = "import os, time\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(60)\nexcept OSError:\n    time.sleep(60)"
    honest = "import os, time\ntime.sleep(0.5)\npid = os.fork()\nif pid: os.waitpid(pid, 0); print('both')"
    rans = run_many(lambda one: run(one, "", QUICK), [bomb, honest, bomb, honest])
    assert [ran.stdout for ran in rans] == ["", "both\n", "", "both\n"]


def test_files_are_bounded_one_by_one() -> None:
    ran = run("open('a', 'wb').write(bytes(2 << 20))", "", QUICK)
    assert last(ran) == "OSError: [Errno 27] File too large" and ran.status == 1


@SPACES
def test_files_are_bounded_together() -> None:
    ran = run("for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))", "", QUICK)
    assert last(ran) == "OSError: [Errno 28] No space left on device"


def test_open_files_are_bounded() -> None:
    ran = run("files = [open('/dev/null') for _ in range(40)]", "", QUICK)
    assert "Too many open files" in last(ran)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_is_stopped_at_the_output_limit(stream: str) -> None:
    ran = run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)", "", Limits(cpu=60, wall=60, output=100_000))
    assert ran.ended == "output" and getattr(ran, stream) == "x" * 100_000


def test_output_of_exactly_the_limit_is_no_flood() -> None:
    assert run("print('x' * 999)", "", Limits(wall=60, output=1000)).ended == "exit"
    assert run("print('x' * 1000)", "", Limits(wall=60, output=1000)).ended == "output"


@SPACES
def test_there_is_no_network() -> None:
    with contextlib.closing(__import__("socket").create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        ran = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", "", SLOW)
    assert last(ran) == "OSError: [Errno 101] Network is unreachable" and ran.status == 1


def test_nothing_of_the_environment_is_inherited(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASCALINE_SECRET", "hunter2")
    ran = run("import os; print(sorted(os.environ)); print(open('/proc/self/environ').read())", "", SLOW)
    assert "SECRET" not in ran.stdout and "hunter2" not in ran.stdout
    names = {"PYTHONHASHSEED", "LC_CTYPE", "TMPDIR"}  # LC_CTYPE is the interpreter's own doing
    assert set(re.findall(r"'(\w+)'", ran.stdout.partition("\n")[0])) <= names


@SPACES
def test_other_files_are_out_of_sight() -> None:
    for path in ("/etc/passwd", os.path.abspath(sandbox.__file__), str(Path.home()), tempfile.gettempdir() + "/.."):
        look = f"import os; p = {path!r}; print(open(p).read() if os.path.isfile(p) else os.path.isdir(p) and os.listdir(p))"
        ran = run(look, "", SLOW)
        assert "root:" not in ran.stdout and "work" not in ran.stdout and "Runs a Python" not in ran.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user is never root")
def test_root_is_given_up(mode: str) -> None:
    only(mode, "spaces", "nobody")
    ran = run("import os; print(os.getresuid(), os.getgroups()); open('/etc/shadow').read()", "", SLOW)
    assert ran.stdout == "(65534, 65534, 65534) []\n" and ran.status == 1
    assert run("import os; os.setuid(0)", "", SLOW).status == 1


@pytest.fixture
def own_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sandbox makes its folders."""
    for path in takewhile(lambda path: path != Path(tempfile.gettempdir()), [tmp_path, *tmp_path.parents]):
        path.chmod(0o711)  # pytest's folders are closed to nobody
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_programs_start_in_an_empty_folder_and_leave_none_behind(mode: str, own_temporary: Path) -> None:
    for _ in range(2):
        ran = run("import os; print(os.listdir()); os.makedirs('a/b'); open('a/b/c', 'w').write('1'); os.chmod('a', 0)", "", SLOW)
        assert ran.stdout == "['program.py']\n" and ran.status == 0
    assert list(own_temporary.iterdir()) == []


def test_grandchildren_in_sessions_of_their_own_die_too(mode: str) -> None:
    mark = secrets.token_hex(8)
    daemon = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", "{mark}"])
    os._exit(0)
import time; time.sleep(0.3)
print("gone")
"""
    ran = run(daemon, "", SLOW)
    assert ran.stdout == "gone\n" and ran.ended == "exit" and ran.seconds < 60
    assert not marked(mark)


def test_a_stopped_program_leaves_no_process(mode: str) -> None:
    mark = secrets.token_hex(8)
    child = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", "{mark}"])
"""
    assert run(child + "while True: print('x' * 1000)", "", Limits(wall=60, output=10_000)).ended == "output"
    assert run(child + "time.sleep(300)", "", QUICK).ended == "wall"
    assert not marked(mark)


def marked(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_text() and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
    return found


@SPACES
def test_the_keeper_cannot_be_killed_or_read() -> None:
    """Process 1 of the program's own world ignores it; nothing of the parent is to be seen there."""
    look = """
import os
try:
    os.kill(1, 9)
except OSError:
    pass
print(os.getppid(), sorted(p for p in os.listdir("/proc") if p.isdigit()))
"""
    ran = run(look, "", SLOW)
    assert ran.stdout == "1 ['1', '2']\n" and ran.ended == "exit"
    assert run("import os; os.listdir('/proc/1/fd')", "", SLOW).status == 1


def test_a_killed_program_is_told_from_an_ended_one() -> None:
    ran = run("import os; os.kill(os.getpid(), 9)", "", SLOW)
    assert (ran.ended, ran.status) == ("signal", -9)


def test_the_order_of_a_set_is_the_same_in_every_run() -> None:
    assert len({run("print(set('abcdefgh'))", "", SLOW).stdout for _ in range(3)}) == 1


def test_many_run_at_once_in_order() -> None:
    together: set[str] = set()
    most = []

    def one(i: int) -> str:
        together.add(threading.current_thread().name)
        most.append(len(together))
        return run(f"import time; time.sleep({0.2 * (i % 2)}); print({i})", "", SLOW).stdout

    assert run_many(one, range(6)) == [f"{i}\n" for i in range(6)]
    assert max(most) == min(6, len(os.sched_getaffinity(0)))


@pytest.fixture
def crowd() -> Iterator[int]:
    """A core that eight others keep busy; each in a session of its own, as Linux shares a core between sessions first."""
    core = min(os.sched_getaffinity(0))
    busy = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, start_new_session=True) for _ in range(8)]
    try:
        for process in others:
            assert process.stdout and process.stdout.readline()
        yield core
    finally:
        for process in others:
            process.kill()
            process.communicate()


def test_a_program_that_gets_no_processor_is_not_blamed_and_a_sleeper_beside_it_is(crowd: int) -> None:
    there = f"import os, time; os.sched_setaffinity(0, [{crowd}])\n"
    limits = Limits(cpu=5, wall=1.0)
    starved, asleep = run_many(lambda end: run(there + end, "", limits), ["while True: pass", "time.sleep(60)"])
    assert (starved.ended, asleep.ended) == ("starved", "wall")


def test_what_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that cannot be set."""
    sound = sandbox.asdict
    monkeypatch.setattr(sandbox, "asdict", lambda limits: sound(limits) | {"processes": "many"})
    ran, _ = sandbox._run("print(1)", "", SLOW, "bare")
    assert ran.ended == "sandbox" and "TypeError" in ran.stderr and ran.stdout == ""


def test_a_killed_parent_leaves_nothing_running(mode: str, own_temporary: Path) -> None:
    """As after kill -9 of a training run: the launcher dies with it, and the program with the launcher; a folder stays."""
    mark = secrets.token_hex(8)
    program = f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(300)', '{mark}'])"
    parent = multiprocessing.get_context("fork").Process(target=run, args=(program, "", Limits(wall=300)))
    parent.start()
    try:
        assert eventually(lambda: bool(marked(mark)))
    finally:
        parent.kill()
        parent.join()
    assert eventually(lambda: not marked(mark))


def eventually(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + 60
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return true()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"cpu": 0}, "cpu = 0"),
        ({"cpu": 1.5}, "whole"),
        ({"wall": -1}, "wall = -1"),
        ({"processes": True}, "processes = True"),
        ({"memory": 1 << 20}, "less than Python itself needs"),
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, float], why: str) -> None:
    with pytest.raises(BadInput, match=why):
        Limits(**wrong)  # type: ignore[arg-type]
