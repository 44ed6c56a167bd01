"""The one thread that owns the engine, and its counter in the event loop.

Requests and cancellations go in through an inbox, which the thread reads between two steps; tokens come out through
loop.call_soon_threadsafe, one call a step for all answers together.
"""

import asyncio
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pascaline.engine import Sampling
from pascaline.errors import BadInput
from pascaline.serve.options import Options
from pascaline.serve.schema import ApiError

if TYPE_CHECKING:
    from pascaline.serve.telemetry import Telemetry

log = logging.getLogger(__name__)
FAILED = "The server failed on this request; its log says why."


@dataclass(frozen=True)
class Piece:
    """What a step added to one of a job's answers. finish_reason: None while it goes on."""

    index: int
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str | None


@dataclass(eq=False)
class Job:
    """One prompt and its answers on their way. number: among the jobs of a submission, whose `events` they share. whole: nothing is told
    before an answer's end. `requests` are the engine's, to be read when they have ended."""

    number: int
    ids: list[int]
    sampling: Sampling
    salt: str
    whole: bool
    events: "asyncio.Queue[tuple[int, Any]]"
    taken: "asyncio.Future[Exception | None]"
    requests: list[Any] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    queued: bool = True
    closed: bool = False
    left: int = 0  # answers that have not ended

    def __post_init__(self) -> None:
        self.left = self.sampling.n


class Service:
    """submit, then iterate over `pieces`, then close; all in the event loop.

    load: makes the engine, in the service's thread; what it raises is kept in `failure`.
    """

    def __init__(self, load: Callable[[], Any], options: Options, telemetry: "Telemetry"):
        self.options, self.telemetry, self._load = options, telemetry, load
        self.engine: Any = None
        self.failure: BaseException | None = None
        self.draining = False
        self.waiting = self.waiting_tokens = 0  # answers that no step has begun yet, and their prompts' tokens
        self.jobs: set[Job] = set()
        self._inbox: queue.SimpleQueue[tuple[str, Job | None, int]] = queue.SimpleQueue()
        self._live: dict[int, tuple[Job, Any]] = {}  # by id(request); the thread's own, as the next
        self._unstarted: set[Job] = set()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False

    # ---- in the event loop -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load; `ready` tells when it is done."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all that runs and let the thread end."""
        self.draining = self._stopping = True
        self._inbox.put(("wake", None, 0))

    async def join(self, seconds: float = 30.0) -> None:
        """Wait for the thread's end."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, seconds)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        return self.engine is not None and self.alive and not self.draining

    def check_room(self, answers: int, tokens: int) -> None:
        """ApiError 429 if the queue has no room for so many answers to prompts of so many tokens, 503 if nothing is taken any more."""
        if not self.ready:
            raise ApiError(
                503, "The server is shutting down." if self.draining else "The model is being loaded.", headers={"retry-after": "5"}
            )
        for what, now, more, most in (
            ("answers wait", self.waiting, answers, self.options.max_queue),
            ("prompt tokens wait", self.waiting_tokens, tokens, self.options.max_queue_tokens),
        ):
            if now + more > most:
                raise ApiError(429, f"The queue is full: {now} {what}, and {more} more are over the limit of {most}; try again later.",
                               code="queue_full", headers={"retry-after": "1"})  # fmt: skip

    async def submit(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], salt: str, whole: bool = False) -> list[Job]:
        """Jobs that the engine has taken, one a prompt. ApiError if there is no room, BadInput if one can never fit: then none is taken.
        whole: nobody wants to see an answer grow."""
        self.check_room(sum(s.n for s in samplings), sum(map(len, prompts)))
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()
        jobs = [
            Job(i, ids, s, salt, whole, events, loop.create_future()) for i, (ids, s) in enumerate(zip(prompts, samplings, strict=True))
        ]
        for job in jobs:
            self.jobs.add(job)
            self.waiting += job.sampling.n
            self.waiting_tokens += len(job.ids)
            self._inbox.put(("add", job, 0))
        try:
            for job in jobs:
                refused = await job.taken
                if refused is not None:
                    raise refused
        except BaseException:
            self.close_all(jobs)
            raise
        return jobs

    async def pieces(self, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Piece] | None]:
        """(number of the job, piece) as they come; None when nothing has come for options.ping_seconds. Raises ApiError where an answer
        failed. Closes the jobs at the end, and when it is closed itself."""
        events, pause, loop = jobs[0].events, self.options.ping_seconds, asyncio.get_running_loop()
        left, last = sum(job.sampling.n for job in jobs), loop.time()

        def tick() -> None:
            if loop.time() - last >= pause:
                events.put_nowait((0, None))
            timer[0] = loop.call_later(pause, tick)

        timer = [loop.call_later(pause, tick)]
        try:
            while left:
                number, event = await events.get()
                last = loop.time()
                if isinstance(event, Exception):
                    raise event
                left -= event is not None and event.finish_reason is not None
                yield None if event is None else (number, event)
        finally:
            timer[0].cancel()
            self.close_all(jobs)

    def close(self, job: Job) -> None:
        """Nobody waits for it any more: what still runs is cancelled before the next step."""
        if not job.closed:
            job.closed = True
            self._begun(job)
            self.jobs.discard(job)
            if job.left:
                self._inbox.put(("cancel", job, 0))

    def close_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.close(job)

    def cut(self, job: Job, index: int) -> None:
        """End one of a job's answers, with the finish reason "stop"."""
        self._inbox.put(("cut", job, index))

    def _begun(self, job: Job) -> None:
        if job.queued:
            job.queued = False
            self.waiting -= job.sampling.n
            self.waiting_tokens -= len(job.ids)

    def _deliver(self, events: list[tuple[Job, Any]]) -> None:
        for job, event in events:
            if event == "begun":
                self._begun(job)
            elif not job.taken.done():  # the first that is heard of it
                job.taken.set_result(None if event == "taken" else event)
            else:
                job.left -= isinstance(event, Piece) and event.finish_reason is not None
                job.events.put_nowait((job.number, event))

    # ---- in the thread -----------------------------------------------------------------------------------------------

    def _post(self, events: list[tuple[Job, Any]]) -> None:
        assert self._loop is not None
        if events:
            try:
                self._loop.call_soon_threadsafe(self._deliver, events)
            except RuntimeError:  # the loop is closed: nobody listens
                self._stopping = True

    def _run(self) -> None:
        try:
            self.engine = self._load()
            gc.collect()
            gc.freeze()  # what is there now stays: looking through it again and again would stop every stream
        except BaseException as error:
            self.failure = error
            return
        while not self._stopping:
            try:
                self._read_inbox()
                if self._live and self.engine.busy:
                    self._step()
            except Exception as error:
                self._fail(list(self._live.values()), error, ApiError(500, FAILED))
        while not self._inbox.empty():
            kind, job, _ = self._inbox.get()
            if job is not None and kind == "add":
                self._post([(job, ApiError(503, "The server is shutting down."))])
        self._fail(list(self._live.values()), None, ApiError(503, "The server is shutting down."))
        gc.unfreeze()  # some libraries complain at the exit about what nobody has collected

    def _read_inbox(self) -> None:
        """Take what has come; wait for it if there is nothing to do."""
        wait = not (self._live and self.engine.busy)
        while not self._stopping:
            try:
                kind, job, index = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if job is not None and kind == "add" and not job.closed:
                self._add(job)
            elif job is not None and kind == "cancel":
                self._unstarted.discard(job)
                for request in job.requests:
                    if self._live.pop(id(request), None) is not None:
                        self._cancel(request)
                        self.telemetry.finished(request, "abort")
            elif job is not None and kind == "cut" and id(job.requests[index]) in self._live:
                del self._live[id(job.requests[index])]
                self._cancel(job.requests[index])
                self.telemetry.finished(job.requests[index], "stop")
                self._post([(job, Piece(index, [], [], [], "stop"))])

    def _add(self, job: Job) -> None:
        try:
            job.requests = self.engine.add(job.ids, job.sampling, job.salt)
        except BadInput as error:
            self._post([(job, error)])
            return
        except Exception:
            log.exception("the engine could not take a request")
            self._post([(job, ApiError(500, FAILED))])
            return
        job.sent = [0] * len(job.requests)
        for request in job.requests:
            self._live[id(request)] = job, request
        self._unstarted.add(job)
        self._post([(job, "taken")])

    def _cancel(self, request: Any) -> None:
        try:
            self.engine.cancel(request)
        except Exception:
            log.exception("the engine could not cancel a request")

    def _step(self) -> None:
        began = time.perf_counter()
        before = self.engine.stats.prefilled, self.engine.stats.generated
        try:
            touched = self.engine.step()
        except Exception as error:
            self._failed(error)
            return
        stats = self.engine.stats
        self.telemetry.stepped(time.perf_counter() - began, stats.prefilled - before[0], stats.generated - before[1])
        events: list[tuple[Job, Any]] = []
        for job in [job for job in self._unstarted if any(r.scheduled or r.finish_reason for r in job.requests)]:
            self._unstarted.discard(job)
            events.append((job, "begun"))
        for request in touched:
            entry = self._live.get(id(request))
            if entry is not None and (not entry[0].whole or request.finish_reason is not None):
                events.append((entry[0], self._piece(request)))
        self._post(events)

    def _piece(self, request: Any) -> Piece | ApiError:
        """What is new of an answer; the request is forgotten if it has ended."""
        job, _ = self._live[id(request)]
        if request.finish_reason is not None:
            del self._live[id(request)]
            self.telemetry.finished(request)
        if request.finish_reason == "error":
            return ApiError(500, request.error or FAILED)
        if request.finish_reason == "cancelled":
            return ApiError(503, "The answer was cancelled.")
        start, job.sent[request.index] = job.sent[request.index], len(request.token_ids)
        end = len(request.token_ids)
        top = request.top_logprobs[start:end]
        return Piece(request.index, request.token_ids[start:end], request.logprobs[start:end], top, request.finish_reason)

    def _failed(self, error: Exception) -> None:
        """A step raised: those that the engine has ended fail, if it ended none those that run, and if none runs all."""
        live = list(self._live.values())
        hit = [e for e in live if e[1].finish_reason == "error"] or [e for e in live if e[1].scheduled] or live
        self._fail(hit, error, ApiError(500, FAILED))

    def _fail(self, entries: list[tuple[Job, Any]], error: Exception | None, told: ApiError) -> None:
        if error is not None:
            log.error("a step of the engine failed", exc_info=error)
        for job, request in entries:
            self._live.pop(id(request), None)
            self._unstarted.discard(job)
            self._cancel(request)
            self.telemetry.finished(request, "error" if error is not None else "abort")
            self._post([(job, told)])
