"""A client of a server in this process, and a scripted engine: it says what it is told to, can be slow, break, and counts what it holds."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx

from pascaline.engine import Sampling
from pascaline.engine.transcript import Transcript
from pascaline.errors import BadInput
from pascaline.serve.api import app
from pascaline.serve.options import Options
from pascaline.tokenizer import Tokenizer, train

CONTEXT = 4096


@dataclasses.dataclass(eq=False)
class FakeRequest:
    prompt: list[int]
    sampling: Sampling
    index: int
    salt: str
    stops: frozenset[int]
    script: list[int]
    transcript: Transcript
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    prompt_top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


class FakeEngine:
    """say(prompt text, index) -> the answer's ids (an end token at its end, or "length" follows), or its text, tags parsed. Words in a
    prompt: POISON makes a step raise, NAN an answer end with "error", CRASH-ADD makes add raise, FOREVER an answer without an end."""

    def __init__(self, say: Callable[[str, int], str | Sequence[int]] | None = None, tokenizer: Tokenizer | None = None, rows: int = 64,
                 delay: float = 0.0, logprob: float = -0.5):  # fmt: skip
        self.tokenizer = tokenizer or train(["Make 12 from 6, 6. The answer is 12. é日本 abc"] * 3, 320)
        self.say = say or (lambda prompt, index: "I think.</think>The answer is 12.<|end|>")
        self.rows, self.delay, self.logprob = rows, delay, logprob
        config = SimpleNamespace(max_position_embeddings=CONTEXT, vocab_size=self.tokenizer.vocab_size, eos_token_id=self.tokenizer.end)
        self.model = SimpleNamespace(config=config, device="cpu")
        names = "steps prefilled generated prefix_queries prefix_hits preemptions drafts draft_tokens accepted_tokens running waiting"
        self.stats = SimpleNamespace(**dict.fromkeys(names.split(), 0), blocks=1000, blocks_used=0, step_seconds=0.0)
        self.capacity = 16000
        self.waiting: list[FakeRequest] = []
        self.running: list[FakeRequest] = []
        self.cancelled = 0
        self.added: list[FakeRequest] = []

    def bytes_per_token(self) -> int:
        return 576

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, prompt: list[int], sampling: Sampling, salt: str = "") -> list[FakeRequest]:
        text = self.tokenizer.decode(prompt, special=True)
        if "CRASH-ADD" in text:
            raise RuntimeError("secret 0x7fff")
        if "NEVER-FITS" in text:
            raise BadInput("this can never fit")
        stops = frozenset({self.tokenizer.end, *sampling.stop_ids})
        made = []
        for index in range(sampling.n):
            said = self.say(text, index)
            script = self.tokenizer.encode(said, special=True) if isinstance(said, str) else list(said)
            made.append(FakeRequest(prompt, sampling, index, salt, stops, script, Transcript(self.tokenizer, prompt, sampling.stop, stops)))
        self.waiting += made
        self.added += made
        self._count()
        return made

    def cancel(self, request: FakeRequest) -> None:
        if request.finish_reason is None:
            self._end(request, "cancelled")
            self.cancelled += 1

    def _end(self, request: FakeRequest, reason: str) -> None:
        request.finish_reason, request.finished = reason, time.monotonic()
        for where in (self.waiting, self.running):
            if request in where:
                where.remove(request)
        self._count()

    def _count(self) -> None:
        self.stats.running, self.stats.waiting, self.stats.blocks_used = len(self.running), len(self.waiting), len(self.running)

    def step(self) -> list[FakeRequest]:
        self.stats.steps += 1
        if self.delay:
            time.sleep(self.delay)
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            request.scheduled = time.monotonic()
            self.running.append(request)
            self.stats.prefilled += len(request.prompt)
            self._prompt(request)
        touched = []
        for request in list(self.running):
            text = self.tokenizer.decode(request.prompt, special=True)
            if "POISON" in text:
                if "ALL" not in text:
                    self._end(request, "error")
                raise RuntimeError("secret 0x7fff")
            if "NAN" in text:
                request.error = "the logits are not finite"
                self._end(request, "error")
            else:
                self._say(request)
            touched.append(request)
        self._count()
        return touched

    def _prompt(self, request: FakeRequest) -> None:
        if request.sampling.prompt_logprobs:
            top = request.sampling.top_logprobs
            request.prompt_logprobs = [None] + [-1.0] * (len(request.prompt) - 1)
            request.prompt_top = [[]] + [[(t, -1.0)][:top] for t in request.prompt[1:]]

    def _say(self, request: FakeRequest) -> None:
        s = request.sampling
        if s.max_tokens == 0:
            self._end(request, "length")
            return
        token = request.script[len(request.token_ids) % len(request.script)]
        request.first_token = request.first_token or time.monotonic()
        request.token_ids.append(token)
        request.logprobs.append(self.logprob)
        if s.top_logprobs:
            request.top_logprobs.append([(token, self.logprob), (9, -3.0)][: s.top_logprobs])
        self.stats.generated += 1
        request.transcript.feed([token])
        if request.transcript.stopped is not None or (token in request.stops and not s.ignore_eos):
            self._end(request, "stop")
        elif len(request.token_ids) >= s.max_tokens:
            self._end(request, "length")

    @property
    def empty(self) -> bool:
        return not self.waiting and not self.running


def requests_of(engine: FakeEngine) -> list[dict[str, Any]]:
    """The samplings that the engine was asked for."""
    return [dataclasses.asdict(r.sampling) for r in engine.added]


@asynccontextmanager
async def connected(engine: Any, headers: dict[str, str] | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that is ready; `client.app` is it."""
    made = app(engine, Options(**options))
    async with made.router.lifespan_context(made):
        while not made.state.service.ready:
            await asyncio.sleep(0.001)
        transport = httpx.ASGITransport(made, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers, timeout=60) as client:
            client.app = made
            yield client
