"""Filters in several processes: the same as in one, in bounded memory, and nothing is left of them however they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pascaline.data import parallel
from pascaline.data.filters import Reason, apply
from pascaline.data.parallel import Workers
from pascaline.data.sources import Document, documents
from pascaline.errors import BadInput


def odd(text: str, divisor: int = 3) -> str | Reason:
    """Drops some, cuts some, leaves the others as they are; and prints, which must do no harm."""
    print("a filter speaks")
    number = int(text.split()[0])
    if number % divisor == 0:
        return Reason("divisor", number)
    return text[:-1] if number % divisor == 1 else text


def fails(text: str, error: type[Exception] | None) -> str | Reason:
    if error is None:
        os.kill(os.getpid(), signal.SIGKILL)
        return text
    raise error("the filter's own words")


def without_torch(text: str) -> str | Reason:
    return Reason("loaded", "torch") if "torch" in sys.modules else text


FILTERS = [("odd", odd), ("even", partial(odd, divisor=5))]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers from the first thousand characters on."""
    monkeypatch.setattr(parallel, "ALONE", 1000)
    monkeypatch.setattr(parallel, "CHUNK", 2000)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """2000 texts, and rows among them that are none."""
    rows = [{"text": f"{n} " + "word " * (n % 40)} if n % 9 else {"txt": n} for n in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl")


def endless(read: list[int]) -> Callable[[Any], Any]:
    def texts(excluded: Any) -> Any:
        number = 0
        while True:
            read.append(number)
            yield Document(f"{number} " + "word " * 50, "here", str(number))
            number += 1

    return texts


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


def listed(stream: Callable[[Any], Any]) -> tuple[list[tuple[Document, int]], list[Any]]:
    """Each document and how much had been told of when it came; and what was told."""
    told: list[Any] = []
    return [(document, len(told)) for document in stream(told.append)], told


def test_any_number_of_processes_gives_the_same(small: None, source: str) -> None:
    def read(excluded: Any) -> Any:
        return documents([source], None, excluded)

    plain = listed(lambda excluded: apply(read(excluded), FILTERS, excluded))
    assert len(plain[0]) > 500 and {entry["filter"] for entry in plain[1]} == {"column", "odd.divisor", "even.divisor"}
    for processes in (1, 2, 3):
        with Workers(FILTERS, processes) as workers:
            assert listed(partial(workers.apply, read)) == plain
            assert len(workers._started) == (0 if processes == 1 else processes)


def test_two_readings_at_once_do_not_mix(small: None, source: str) -> None:
    def read(excluded: Any) -> Any:
        return documents([source], 40_000, excluded)

    with Workers(FILTERS, 2) as workers:
        one, other = (workers.apply(read, lambda _: None) for _ in range(2))
        pairs = list(zip(one, other, strict=True))
    assert len(pairs) > 100 and all(a == b for a, b in pairs)


def test_a_small_corpus_starts_nothing(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "_start", lambda self: pytest.fail("not worth it"))
    with Workers(FILTERS, 8) as workers:
        assert list(workers.apply(lambda excluded: documents([source], None, excluded), lambda _: None))


def test_reading_keeps_near_to_what_was_taken(small: None) -> None:
    read: list[int] = []
    chunk = 2000 // 256 + 1  # documents
    with Workers([("odd", partial(odd, divisor=10**9))], 2) as workers:
        found = workers.apply(endless(read), lambda _: None)
        for taken in range(300):
            next(found)
            assert len(read) <= taken + 6 * chunk  # four under way, one being taken up, one being read


def test_workers_load_no_torch(small: None) -> None:
    with Workers([("without_torch", without_torch)], 2) as workers:
        workers._characters = parallel.ALONE  # this process may have it
        found = workers.apply(endless([]), lambda entry: pytest.fail(str(entry)))
        assert len([next(found) for _ in range(100)]) == 100 and len(workers._started) == 2


def test_a_dead_worker_is_one_sentence(small: None, source: str) -> None:
    with Workers([("fails", partial(fails, error=None))], 2) as workers:
        monkey = workers.filters
        workers.filters = FILTERS  # those in this process; the others get the deadly one
        found = workers.apply(endless([]), lambda _: None)
        next(found)
        workers.filters = monkey
        with pytest.raises(BadInput, match=r"^a process that .* died \(signal 9, as when memory is short\); try corpus\.processes = 1$"):
            for _ in range(1000):
                next(found)
        pids = [process.pid for process in workers._started]
    assert pids and gone(pids)


@pytest.mark.parametrize("error", [BadInput, ZeroDivisionError])
def test_what_a_filter_raises_is_raised_here(small: None, error: type[Exception]) -> None:
    with pytest.raises(error, match="own words"), Workers([("fails", partial(fails, error=error))], 2) as workers:
        workers._characters = parallel.ALONE
        list(workers.apply(endless([]), lambda _: None))


def test_workers_that_cannot_be_started_are_one_sentence(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(parallel.subprocess, "Popen", refuse)
    with pytest.raises(BadInput, match=r"cannot be started .*temporarily"), Workers(FILTERS, 4) as workers:
        list(workers.apply(endless([]), lambda _: None))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_stays_behind(small: None, error: type[BaseException] | None) -> None:
    pids: list[int] = []
    try:
        with Workers(FILTERS, 2) as workers:
            found = workers.apply(endless([]), lambda _: None)
            for _ in range(50):
                next(found)
            pids += [process.pid for process in workers._started]
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert len(pids) == 2 and gone(pids)


def test_a_script_without_a_guard_works_and_when_it_is_killed_its_workers_end(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import time\n"
        "from pascaline.data import parallel\n"
        "from pascaline.data.quality import runs\n"
        "from pascaline.data.sources import Document\n"
        "parallel.ALONE, parallel.CHUNK = 100, 1000\n"
        "workers = parallel.Workers([('runs', runs)], 2).__enter__()\n"
        "texts = (Document(f'{n} some text', 'here', str(n)) for n in range(100))\n"
        "print(len(list(workers.apply(lambda excluded: texts, print))), flush=True)\n"
        "print(*(process.pid for process in workers._started), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None and script.stdout.readline() == "100\n"
        pids = list(map(int, script.stdout.readline().split()))
        assert len(pids) == 2 and all(map(alive, pids))
        script.kill()
    assert gone(pids)
