"""Filters over documents in several processes. What comes out is what one process gives, in the same order.

Reading, which is ten times as fast, stays in this process. It cuts what it reads into chunks, at most two for each worker are
under way, and their results are taken up in the order of reading: memory is bounded however long the corpus is.
A worker is a fresh Python that loads the filters and no torch. It is started here rather than by `multiprocessing`, whose
children run the user's script again where it has no `__main__` guard, and outlive a parent that was killed.
They speak pickle, as those of `multiprocessing` do, through pipes that nobody else has: filters are functions of any module, and
nothing that came from a file or a user is ever unpickled.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from pascaline.data.filters import Filter, Reason, apply, judge, settle
from pascaline.data.sources import Document, Excluded
from pascaline.errors import BadInput

ALONE = 1 << 21  # characters filtered here before workers are started, which take about as long to be ready
CHUNK = 1 << 19  # characters sent at once: some 0.2 s of work
LEAST = 256  # characters that a document counts at least, for what surrounds its text in memory
TURN = "from pascaline.data.parallel import serve; serve()"


class Workers:
    """`with Workers(filters, processes) as workers: workers.apply(read, excluded)`, as often as is wanted, also at once.

    processes: 0 is one for each core that this process may use, 1 is none beside this one. The others start when the texts
    are more than ALONE characters in all, and are gone when the block is left, or when this process dies.
    """

    def __init__(self, filters: Sequence[tuple[str, Filter]], processes: int) -> None:
        self.filters = filters
        self.processes = processes or cores()
        self._characters = 0
        self._threads: ThreadPoolExecutor | None = None
        self._started: list[subprocess.Popen[bytes]] = []
        self._own = threading.local()  # each thread speaks with one process

    def apply(self, read: Callable[[Excluded], Iterable[Document]], excluded: Excluded) -> Iterator[Document]:
        """`filters.apply` of what `read` gives; what `read` excludes is told in its place among what the filters exclude.

        What is excluded between two documents is held in memory. Raises BadInput when a worker cannot be started or dies,
        and whatever `read` or a filter raises.
        """
        pending: deque[tuple[list[Any], Future[list[str | Reason | None]]]] = deque()
        try:
            for chunk in _chunks(read):
                texts = [event.text for event in chunk if isinstance(event, Document)]
                if self.processes == 1 or self._characters < ALONE:
                    self._characters += sum(map(len, texts))
                    yield from apply(_told(chunk, excluded), self.filters, excluded)
                    continue
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(self.processes, "filters")
                pending.append((chunk, self._threads.submit(self._ask, texts)))
                if len(pending) >= 2 * self.processes:
                    yield from _settled(*pending.popleft(), excluded)
            while pending:
                yield from _settled(*pending.popleft(), excluded)
        finally:  # nobody wants the rest
            for _, verdicts in pending:
                verdicts.cancel()

    def _ask(self, texts: list[str]) -> list[str | Reason | None]:
        """One chunk's verdicts, None for a text that passes as it is."""
        process: Any = getattr(self._own, "process", None)
        try:
            if process is None:
                self._own.process = process = self._start()
            pickle.dump(texts, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)  # from our own child, through a pipe that nobody else has
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            why = f"cannot be started ({error})" if process is None else f"has died ({_ending(process)})"
            raise BadInput(f"a process that filters the corpus {why}; try corpus.processes = {max(self.processes // 2, 1)}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        # One thread each: they would only fight for the cores. Our own path: what is importable here must be so there.
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **single, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # -P: nothing lying about in the current folder is imported. A session of its own: Ctrl-C is for this process alone.
        process = subprocess.Popen([sys.executable, "-P", "-c", TURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env=environment, start_new_session=True)  # fmt: skip
        self._started.append(process)
        pickle.dump(self.filters, process.stdin)  # type: ignore[arg-type]
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._threads is None:
            return
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in [*self._started]:  # they hold nothing of worth, and a thread that waits for an answer is told at once
            process.kill()
        self._threads.shutdown()  # a thread that was just starting a process gets one answer from it
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # there may be something that was not sent yet
                    pipe.close()  # type: ignore[union-attr]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chunks(read: Callable[[Excluded], Iterable[Document]]) -> Iterator[list[Any]]:
    """What is read: documents, and among them in their places the entries that were excluded."""
    chunk: list[Any] = []
    size = 0
    for document in read(chunk.append):
        chunk.append(document)
        size += max(len(document.text), LEAST)
        if size >= CHUNK:
            yield chunk[:]
            chunk.clear()
            size = 0
    yield chunk


def _told(chunk: list[Any], excluded: Excluded) -> Iterator[Document]:
    """The documents; the rest is passed to `excluded`."""
    for event in chunk:
        if isinstance(event, Document):
            yield event
        else:
            excluded(event)


def _settled(chunk: list[Any], verdicts: Future[list[str | Reason | None]], excluded: Excluded) -> Iterator[Document]:
    found = iter(verdicts.result())
    for document in _told(chunk, excluded):
        verdict = next(found)
        yield from settle(document, document.text if verdict is None else verdict, excluded)


def _ending(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)  # its pipe is closed a moment before it is gone
    code = process.returncode
    if code is None:
        return "its answer was cut off"
    return f"signal {-code}{', as when memory is short' if code == -9 else ''}" if code < 0 else f"exit code {code}"


def _answer(texts: list[str], filters: Sequence[tuple[str, Filter]]) -> list[str | Reason | None] | Exception:
    try:
        return [None if (verdict := judge(text, filters)) is text else verdict for text in texts]
    except Exception as error:  # raised again where it was asked
        return error


def serve() -> None:
    """A worker's life: filters from standard input, then for each list of texts a list of verdicts to standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a filter that prints must not spoil the answers
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # whoever asked is gone
        filters = pickle.load(sys.stdin.buffer)
        while True:
            texts = pickle.load(sys.stdin.buffer)
            pickle.dump(_answer(texts, filters), answers)
            answers.flush()
    os._exit(0)  # without flushing into the void
