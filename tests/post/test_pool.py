"""The pool: whatever a call does, it has one result, and the others have theirs; and nothing is left of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pascaline.errors import BadInput
from pascaline.post.verifiers import pool as pools
from pascaline.post.verifiers.pool import Failure, Pool

ACT = "pooled:act"
MIB = 1 << 20


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, timeout=1.5) as pool:
        yield pool


def act(pool: Pool, *calls: tuple[Any, ...]) -> list[Any]:
    return pool.map(ACT, [list(call) for call in calls])


def same(n: int) -> list[tuple[Any, ...]]:
    return [("same", i) for i in range(n)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_many_results_come_in_the_order_of_their_calls(pool: Pool) -> None:
    assert act(pool, *same(5000)) == list(range(5000))
    assert act(pool) == []


def test_results_are_json_of_any_size(pool: Pool) -> None:
    texts = [chr(97 + i) * MIB for i in range(6)]
    assert act(pool, *[("same", text) for text in texts]) == texts
    assert act(pool, ("same", {"a": [1, None, "\ud800 é\n"]})) == [{"a": [1, None, "\ud800 é\n"]}]


def test_each_failure_is_that_of_one_call(pool: Pool) -> None:
    """The process that raised goes on; one that died or hung is replaced."""
    before = pool.kills
    bad = [("raise", 7), ("leave",), ("input",), ("object",), ("signal",), ("exit",), ("memory", 2 << 30), ("sleep", 1000)]
    mixed = [call for i, one in enumerate(bad) for call in (one, ("same", i))]
    found = act(pool, *mixed)
    assert found[1::2] == list(range(len(bad)))
    failures = found[::2]
    assert [failure.kind for failure in failures] == ["error"] * 4 + ["crash"] * 3 + ["timeout"]
    texts = ["ValueError: no 7", "SystemExit", "EOFError", "TypeError", "signal 9", "exit code 3", "1024 MiB", "within 1.5 s"]
    assert all(text in failure.text for text, failure in zip(texts, failures, strict=True)), failures
    assert pool.kills == before + 1


def test_hostile_calls_cost_the_honest_ones_nothing_but_their_own_time(pool: Pool) -> None:
    """More of them than processes, and they hold the interpreter's lock, which no timer within the process could break."""
    before = pool.kills
    calls = same(400)
    for place in (0, 1, 2, 50, 399):
        calls[place] = ("power",)
    found = act(pool, *calls)
    assert [i for i, one in enumerate(found) if isinstance(one, Failure)] == [0, 1, 2, 50, 399]
    assert all(one == i for i, one in enumerate(found) if not isinstance(one, Failure))
    assert pool.kills == before + 5


def test_what_was_sent_ahead_behind_a_hanging_call_is_done_by_the_other_process() -> None:
    """The pace is that of short calls when one hangs, so that dozens wait behind it; they are done long before it is killed."""
    with Pool(2, timeout=3) as pool:
        found = pool.map("pooled:late", [[i, 1500] for i in range(3000)])
    times = [one[1] for one in found if not isinstance(one, Failure)]
    assert len(times) == 2999
    assert max(times) - min(times) < 3, "an honest call waited for the timeout of the hostile one"


def test_a_slow_call_is_no_failure_and_is_done_once(pool: Pool) -> None:
    before = pool.kills
    assert act(pool, *same(300), ("sleep", 0.6), *same(300)) == [*range(300), 0.6, *range(300)]
    assert pool.kills == before


def test_a_spare_is_ready_when_a_process_is_killed() -> None:
    with Pool(1, timeout=2) as pool:
        pids = act(pool, ("pid",))
        began = time.monotonic()
        found = pool.map("pooled_slowly:slow_to_load", [[True], [False]])
        assert [isinstance(one, Failure) for one in found] == [True, False]
        assert found[1][1] - began < 2 + 1 + 0.7, "loading takes a second, and was not done beside the hanging call"
        assert act(pool, ("pid",)) != pids


def test_what_functions_print_and_read_does_not_touch_the_pipes(pool: Pool) -> None:
    assert act(pool, *[("noise", i) for i in range(50)]) == list(range(50))


def test_memory_that_calls_keep_does_not_starve_the_next(pool: Pool) -> None:
    """MemoryError would be an Exception that math-verify swallows: the next answer would be wrong."""
    kept = act(pool, *[("keep", 200 * MIB)] * 12)
    assert max(kept) <= 5 and not any(isinstance(one, Failure) for one in kept)


def test_processes_load_what_they_call_and_nothing_else(pool: Pool) -> None:
    with Pool(1) as fresh:
        assert act(fresh, ("modules",)) == [[]]
    assert pool.map("pascaline.post.verifiers.base:split", [["<think>a</think>b"]]) == [["a", "b"]]
    assert "torch" not in act(pool, ("modules",))[0]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("pooled:nothing", "AttributeError"),
        ("nowhere:act", "ModuleNotFoundError"),
        ("pooled:kept", "no function"),
        ("pooled_slowly:dies", "exit code 4"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_said(pool: Pool, function: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        pool.map(function, [[1]] * 3)
    assert act(pool, *same(3)) == [0, 1, 2]


def test_too_little_memory_is_said() -> None:
    with Pool(1, memory=MIB) as pool, pytest.raises(BadInput, match="1 MiB"):
        act(pool, *same(1))


def test_processes_that_were_killed_between_two_maps_cost_no_call(pool: Pool) -> None:
    pids = [worker._process.pid for worker in [*pool._crew, *pool._spares]]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert until(lambda: not any(map(alive, pids)))
    assert act(pool, *same(20)) == list(range(20))


def test_close_ends_all_and_a_later_map_starts_anew() -> None:
    pool = Pool(2)
    pids = [*act(pool, ("pid",), ("pid",)), act(pool, ("child",))[0]]
    assert all(map(alive, pids))
    pool.close()
    pool.close()
    assert until(lambda: not any(map(alive, pids)))
    assert act(pool, *same(2)) == [0, 1]
    pool.close()


def test_threads_share_a_pool(pool: Pool) -> None:
    found: dict[int, list[Any]] = {}
    threads = [threading.Thread(target=lambda t=t: found.update({t: act(pool, *[("same", [t, i]) for i in range(200)])})) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {t: [[t, i] for i in range(200)] for t in range(4)}


def test_a_forked_child_has_processes_of_its_own(pool: Pool) -> None:
    mine = set(act(pool, ("pid",), ("pid",)))
    child = os.fork()
    if child == 0:
        theirs = act(pool, ("pid",), ("pid",))
        pool._kill()
        os._exit(0 if theirs and not mine & set(theirs) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert act(pool, *same(50)) == list(range(50))
    assert mine & set(act(pool, ("pid",), ("pid",)))


def test_one_pool_is_shared_for_each_timeout() -> None:
    assert pools.shared() is pools.shared(5.0) is not pools.shared(4.0)


PARENT = """
import sys, threading
from pascaline.post.verifiers.pool import Pool
pool = Pool(2, timeout=100)
print(*pool.map("pooled:act", [["pid"], ["pid"]]), *pool.map("pooled:act", [["child"]]), flush=True)
what = sys.argv[1]
if what == "busy":
    pool.map("pooled:act", [["power"], ["power"]])
if what == "idle":
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("what", "how"), [("busy", signal.SIGINT), ("busy", signal.SIGKILL), ("idle", signal.SIGKILL), ("idle", signal.SIGTERM), ("done", 0)]
)
def test_however_the_parent_ends_no_process_is_left(what: str, how: int) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, what], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                              env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    time.sleep(0.3 if what == "busy" else 0)
    if how:
        parent.send_signal(how)
    parent.wait(timeout=30)
    assert until(lambda: not any(map(alive, pids))), (what, how)


def test_ctrl_c_leaves_a_pool_that_goes_on(pool: Pool) -> None:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        act(pool, ("sleep", 1.2), ("sleep", 1.2))
    assert act(pool, *same(20)) == list(range(20))
