"""A pool of processes for work that may hang or crash: each call has its time, and whoever passes it is killed.

Not `multiprocessing`: its children run the user's script again, outlive a parent that was killed, and speak pickle. And no SIGALRM, which
works in a main thread only and cannot interrupt a power of huge numbers. A process (worker.py) gets JSON lines and answers with JSON lines.

Short calls are sent ahead, some 20 ms of work, so that no process waits for its next one. When a call is slow, what waits behind it goes
back to the front of the queue, for the others, and a spare process is started: it has loaded what it needs when the slow one is killed.
So a call that hangs costs the others at most its own timeout, and that only if all processes hang.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pascaline.data.parallel import cores
from pascaline.errors import BadInput

AHEAD = 0.02  # seconds of work sent ahead to one process
MOST = 64  # calls sent ahead at most
PATIENCE = 0.25  # seconds after which a call is slow, or a quarter of its time
TICK = 0.05  # seconds between two looks at the clock
START = 120.0  # seconds that loading a function may take, on a machine that is busy otherwise
LOAD = -1  # in a window: not a call, but the order to load the function


@dataclass(frozen=True)
class Failure:
    """A call without a result: it passed its time, its process died, or it raised."""

    kind: Literal["timeout", "crash", "error"]
    text: str


class Pool:
    """`workers` processes (0: one for each core), each call with `timeout` seconds, each process with `memory` bytes of address space.

    Processes start when there is something to do and are kept until `close`; a `map` after it starts new ones. They die with this
    process, however it ends. Threads may share a pool: their maps take turns. A forked child starts processes of its own.
    """

    def __init__(self, workers: int = 0, timeout: float = 5.0, memory: int = 1 << 30) -> None:
        self.workers, self.timeout, self.memory = workers or cores(), timeout, memory
        self.slow = min(PATIENCE, timeout / 4)
        self.kills = 0  # processes killed because a call took too long
        self._crew: list[_Worker] = []
        self._spares: list[_Worker] = []
        self._ears = selectors.PollSelector()  # no file of its own, which a forked child would share
        self._lock = threading.Lock()
        _pools.add(self)

    def map(self, function: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """The result of function(*call) for each call, or a Failure; in their order. function: "module:function"; calls: JSON values.

        BadInput if the function cannot be loaded, or a process cannot be started.
        """
        work = _Work(function, calls)
        with self._lock:
            try:
                for worker in [*self._crew, *self._spares]:
                    if worker.died():  # since the last map: no call of this one is at fault
                        self._retire(worker, work)
                while work.left:
                    self._man(work)
                    self._turn(work)
            except BadInput:  # none of them can load it
                self._kill()
                raise
            finally:  # done, Ctrl-C, or whatever: what is still busy is busy for nobody
                for worker in [*self._crew, *self._spares]:
                    if worker.busy:
                        self._retire(worker, work)
        return work.results

    def close(self) -> None:
        """Kill the processes."""
        with self._lock:
            self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _man(self, work: _Work) -> None:
        """A process for each call, up to their number; a spare for each that may soon be killed; and calls for those that wait."""
        while len(self._crew) < min(self.workers, work.left):
            self._crew.append(self._spares.pop(0) if self._spares else self._start())
        late = sum(worker.busy and worker.waited() > self.slow for worker in self._crew)
        while len(self._spares) < late:
            self._spares.append(self._start())
        for worker in [*self._crew, *self._spares]:
            if worker.function != work.function:
                worker.load(work.function)
        depth = work.depth(self.workers)
        for worker in self._crew:
            if not worker.loading and len(worker.window) <= depth // 2:
                work.give(worker, depth - len(worker.window))

    def _turn(self, work: _Work) -> None:
        """Hear what the processes say, then see who is late: in this order, as it may be this process that was held up."""
        longest = max((worker.waited() for worker in self._crew if worker.busy), default=0.0)
        for key, event in self._ears.select(min(max(self.timeout - longest, 0.0), TICK)):
            worker = key.data
            if worker.gone:  # since this turn began
                continue
            if event == selectors.EVENT_WRITE:
                worker.flush()
            elif not self._hear(worker, work):
                self._retire(worker, work)
        for worker in [*self._crew, *self._spares]:
            if worker.loading and worker.waited() > START:
                raise BadInput(f"a process that loads {worker.function} was not ready after {START:g} s.")
            if worker.busy and worker.waited() > self.timeout:
                self.kills += 1
                work.fail(worker, Failure("timeout", f"no answer within {self.timeout:g} s"))
                self._retire(worker, work)
            elif worker.busy and worker.waited() > self.slow:
                work.take_back(worker, [*worker.window][1:])

    def _hear(self, worker: _Worker, work: _Work) -> bool:
        """Take up what a process answered; False if it is of no more use."""
        lines = worker.read()
        if lines is None:
            if worker.loading:
                raise BadInput(f"a process that loads {worker.function} within {self.memory >> 20} MiB died: {worker.ending()}.")
            if worker.busy:
                work.fail(worker, Failure("crash", f"its process died: {worker.ending()}"))
            return False
        work.timed(worker, len(lines))
        for line in lines:
            place = worker.window.popleft()
            kind, value, last = json.loads(line)
            if place != LOAD:
                work.settle(worker, place, value if kind == "done" else Failure(kind, value))
            elif kind != "done":
                raise BadInput(f"{worker.function} cannot be loaded in a process of its own: {value}.")
            if last:
                return False
        return True

    def _start(self) -> _Worker:
        try:
            return _Worker(self.memory, self._ears)
        except OSError as error:
            raise BadInput(f"a process of the pool cannot be started: {error}.") from error

    def _retire(self, worker: _Worker, work: _Work) -> None:
        for group in (self._crew, self._spares):
            if worker in group:
                group.remove(worker)
        worker.kill()
        work.take_back(worker, worker.window)

    def _kill(self) -> None:
        for worker in [*self._crew, *self._spares]:
            worker.kill()
        self._crew, self._spares = [], []

    def _forget(self) -> None:
        """In a forked child: the processes are the parent's, and the lock may be held by a thread that is not here."""
        for worker in [*self._crew, *self._spares]:
            worker.let_go()
        self._crew, self._spares, self._lock = [], [], threading.Lock()


class _Work:
    """What one `map` has to do: which calls wait, which are settled, and how fast they go."""

    def __init__(self, function: str, calls: Sequence[Sequence[Any]]) -> None:
        self.function, self.calls, self.left = function, calls, len(calls)
        self.results: list[Any] = [None] * len(calls)
        self._waiting = deque(range(len(calls)))
        self._settled = bytearray(len(calls))
        self._pace: float | None = None  # seconds a call, a moving average

    def depth(self, workers: int) -> int:
        """How many calls a process may have at once: few where calls are long, or are about to run out."""
        if self._pace is None:
            return 1
        return max(1, min(MOST, int(AHEAD / self._pace), math.ceil(len(self._waiting) / workers)))

    def give(self, worker: _Worker, count: int) -> None:
        places: list[int] = []
        while self._waiting and len(places) < count:
            place = self._waiting.popleft()
            if not self._settled[place]:
                places.append(place)
        worker.own.update(places)
        worker.send(places, [list(self.calls[place]) for place in places])

    def take_back(self, worker: _Worker, places: Sequence[int]) -> None:
        """To the front of the queue. The process may still come to do them: whichever answer is first counts."""
        for place in reversed(places):
            if place in worker.own:
                worker.own.remove(place)
                self._waiting.appendleft(place)

    def timed(self, worker: _Worker, answers: int) -> None:
        """So many answers came since the clock of this process was last set; what sends its answer has not hung."""
        if answers and worker.busy:
            pace = max(worker.waited() / answers, 1e-6)
            self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace
        worker.began = time.monotonic()

    def settle(self, worker: _Worker, place: int, result: Any) -> None:
        worker.own.discard(place)
        if not self._settled[place]:
            self._settled[place] = True
            self.results[place] = result
            self.left -= 1

    def fail(self, worker: _Worker, failure: Failure) -> None:
        """The call that a process was at; unless another process has it now."""
        if worker.window[0] in worker.own:
            self.settle(worker, worker.window[0], failure)


class _Worker:
    """One process: the pipes to it, and what it was asked and has not answered."""

    def __init__(self, memory: int, ears: selectors.BaseSelector) -> None:
        self.function = ""
        self.window: deque[int] = deque()  # places of the calls in their map; the process is at the first
        self.own: set[int] = set()  # those of them that no other process may have
        self.began = 0.0  # when the first was begun
        self._ears, self._unsent, self._heard = ears, bytearray(), bytearray()
        file = str(Path(__file__).with_name("worker.py"))
        end, mine = os.pipe()
        self._lifeline = os.fdopen(mine, "wb", 0)  # nothing is written: the process dies when it is closed
        try:  # -P: its own folder, with modules of any name, is not to be imported from. A session of its own: Ctrl-C is not for it.
            self._process = subprocess.Popen([sys.executable, "-P", file, str(memory), str(end)], stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[end], bufsize=0,
                                             start_new_session=True, env=environment())  # fmt: skip
        finally:
            os.close(end)
        assert self._process.stdin and self._process.stdout
        self._questions, self._answers = self._process.stdin, self._process.stdout
        for pipe in (self._questions, self._answers):  # with many to serve, none is waited for
            os.set_blocking(pipe.fileno(), False)
        ears.register(self._answers, selectors.EVENT_READ, self)

    @property
    def loading(self) -> bool:
        return LOAD in self.window  # no call is sent to it until it is ready

    @property
    def busy(self) -> bool:
        return bool(self.window) and not self.loading

    @property
    def gone(self) -> bool:
        return bool(self._answers.closed)

    def waited(self) -> float:
        return time.monotonic() - self.began

    def load(self, function: str) -> None:
        self.function = function
        self.send([LOAD], [function])

    def send(self, places: Sequence[int], asked: Sequence[Any]) -> None:
        if places and not self.window:
            self.began = time.monotonic()
        self.window.extend(places)
        for line in asked:
            self._unsent += json.dumps(line).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the pipe takes, and have it told when it takes more."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._questions.fileno(), self._unsent[:65536])]
        except BlockingIOError:
            if self._questions not in self._ears.get_map():
                self._ears.register(self._questions, selectors.EVENT_WRITE, self)
            return
        except BrokenPipeError:  # it has died: that is heard at the other pipe
            self._unsent.clear()
        self._hush(self._questions)

    def read(self) -> list[bytes] | None:
        """The lines that came; None at the end."""
        try:
            chunk = os.read(self._answers.fileno(), 1 << 18)
        except BlockingIOError:
            return []
        if not chunk:
            return None
        self._heard += chunk
        if b"\n" not in chunk:
            return []
        *lines, self._heard = self._heard.split(b"\n")
        return [bytes(line) for line in lines]

    def died(self) -> bool:
        return self._process.poll() is not None

    def ending(self) -> str:
        """How a process that closed its pipe ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)  # its pipe is closed a moment before it is gone
        code = self._process.returncode
        return "it does not answer" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with whatever it started
        self._process.wait()
        self._close()

    def let_go(self) -> None:
        self._process.returncode = 0  # it is not ours to wait for
        self._close()

    def _close(self) -> None:
        for pipe in (self._questions, self._answers, self._lifeline):
            self._hush(pipe)
            pipe.close()

    def _hush(self, pipe: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._ears.unregister(pipe)


def environment() -> dict[str, str]:
    """Ours, with one thread a process, our path (what is importable here must be so there) and one order of sets for all."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**os.environ, **single, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_shared: dict[float, Pool] = {}


def shared(timeout: float = 5.0) -> Pool:
    """The pool of all verifiers of this process that give a call so many seconds."""
    return _shared.setdefault(timeout, Pool(timeout=timeout))


def _forget_all() -> None:
    for pool in [*_pools]:
        pool._forget()


def _kill_all() -> None:
    for pool in [*_pools]:
        pool._kill()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_kill_all)
