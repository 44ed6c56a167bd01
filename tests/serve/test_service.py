"""The thread that owns the engine: who goes away is forgotten at once, what fails fails alone, and nothing is left behind."""

import asyncio
import contextlib
import json
import random
import threading
from typing import Any

import pytest
from fake import FakeEngine, connected
from test_chat_completions import HI, URL, events

from pascaline.errors import BadInput
from pascaline.serve.api import app
from pascaline.serve.options import Options
from pascaline.serve.schema import ApiError


class Browser:
    """An ASGI client that goes away: after so many messages, or when it is told to."""

    def __init__(self, made: Any, body: dict[str, Any], path: str = URL, broken_pipe: bool = False):
        self.made, self.path, self.body, self.broken_pipe = made, path, json.dumps(body).encode(), broken_pipe
        self.gone = asyncio.Event()
        self.messages: list[Any] = []
        self.read = False
        self.leave_after = -1

    async def receive(self) -> dict[str, Any]:
        if not self.read:
            self.read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if self.broken_pipe and self.gone.is_set():
            raise OSError("broken pipe")
        self.messages.append(message)
        if len(self.messages) == self.leave_after:
            self.gone.set()
        await asyncio.sleep(0)

    async def visit(self) -> None:
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": self.path,
                 "raw_path": self.path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": headers,
                 "client": ("127.0.0.1", 1), "server": ("localhost", 80)}  # fmt: skip
        await self.made(scope, self.receive, self.send)


async def settled(engine: FakeEngine, service: Any) -> None:
    """Nothing waits, runs or is held; within a second."""
    for _ in range(1000):
        if engine.empty and not service.jobs and not service._live and not service._unstarted:
            break
        await asyncio.sleep(0.001)
    assert engine.empty and not service.jobs and not service._live and not service._unstarted
    assert service.waiting == service.waiting_tokens == 0 and engine.stats.blocks_used == 0


def test_a_thousand_disconnects_leave_nothing_behind():
    """serving.md C 12: a client that went away kept its blocks, streamed or not (Starlette cancels only streams); and an answer that has
    ended must not be aborted afterwards (58,455 useless aborts). No request, task or handle is left."""
    draw = random.Random(0)
    engine = FakeEngine(lambda prompt, i: "thought</think>" + "text " * draw.randrange(1, 12) + "<|end|>", rows=16, delay=0.0005)

    async def visit(made: Any) -> bool:
        body = {"messages": HI, "stream": draw.random() < 0.5, "n": draw.choice([1, 1, 2]), "max_tokens": draw.randrange(1, 60)}
        path = URL
        if draw.random() < 0.3:
            path = "/v1/completions"
            body = {**body, "prompt": ["a", "b"][: draw.randrange(1, 3)]}
        browser = Browser(made, body, path, broken_pipe=draw.random() < 0.5)
        browser.leave_after = draw.choice([-1, 1, 2, 3, 5, 8])
        task = asyncio.create_task(browser.visit())
        how = draw.random()
        if how < 0.5:
            for _ in range(draw.randrange(0, 30)):
                await asyncio.sleep(0)
            browser.gone.set()
        elif how < 0.6:  # the server's own cancellation
            for _ in range(draw.randrange(0, 30)):
                await asyncio.sleep(0)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await task
        return how < 0.6

    async def all_of_them() -> None:
        async with connected(engine) as client:
            service = client.app.state.service
            tasks, threads = len(asyncio.all_tasks()), threading.active_count()
            for _ in range(20):
                await asyncio.gather(*(visit(client.app) for _ in range(50)))
            await settled(engine, service)
            await asyncio.sleep(0.01)
            assert len(asyncio.all_tasks()) == tasks and threading.active_count() <= threads + 32  # to_thread keeps its own
            assert all(tenant.running == 0 for tenant in [client.app.state.everybody])
            answer = await client.post(URL, json={"messages": HI})
            assert answer.status_code == 200
            assert engine.cancelled > 100

    asyncio.run(all_of_them())
    ended = [r for r in engine.added if r.finish_reason in ("stop", "length")]
    assert len(ended) > 100 and all(r.finish_reason for r in engine.added)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_cancelled_within_a_step(stream):
    """serving.md C 7 and 12."""
    engine = FakeEngine(lambda *_: "x" * 100, delay=0.005)

    async def one() -> None:
        async with connected(engine) as client:
            browser = Browser(client.app, {"messages": HI, "stream": stream})
            task = asyncio.create_task(browser.visit())
            while not engine.running or len(engine.running[0].token_ids) < 3:
                await asyncio.sleep(0.001)
            before = engine.stats.steps
            browser.gone.set()
            await task
            await settled(engine, client.app.state.service)
            assert engine.cancelled == 1 and engine.stats.steps <= before + 3  # the one at work, and what passed until it was looked at

    asyncio.run(one())


def test_an_answer_that_ended_is_not_cancelled():
    """serving.md C 12: useless aborts after a normal end."""
    engine = FakeEngine()

    async def one() -> None:
        async with connected(engine) as client:
            for stream in (True, False):
                await client.post(URL, json={"messages": HI, "stream": stream, "n": 3})
            await settled(engine, client.app.state.service)

    asyncio.run(one())
    assert engine.cancelled == 0


POISON = [{"role": "user", "content": "POISON"}]


@pytest.mark.parametrize("word, code", [("POISON", 500), ("POISON ALL", 500), ("NAN", 500), ("CRASH-ADD", 500), ("NEVER-FITS", 400)])
def test_what_fails_fails_alone(word, code):
    """An exception in one request is its own, the text is generic (CVE-2026-22778: an exception's text gave heap addresses away), and the
    server goes on. POISON ALL: the engine cannot tell whose it was, so that what runs fails, and what comes after does not."""
    engine = FakeEngine(lambda prompt, i: "x" * 30 + "<|end|>", delay=0.001)
    bad = [{"role": "user", "content": word}]

    async def one() -> None:
        async with connected(engine) as client:
            good = [asyncio.create_task(client.post(URL, json={"messages": HI, "max_tokens": 60})) for _ in range(3)]
            whole = await client.post(URL, json={"messages": bad})
            assert whole.status_code == code and set(whole.json()["error"]) == {"message", "type", "param", "code"}
            assert "secret" not in whole.text and "0x7f" not in whole.text and "RuntimeError" not in whole.text
            answers = await asyncio.gather(*good)
            if "ALL" not in word:
                assert [a.status_code for a in answers] == [200] * 3
            streamed = await client.post(URL, json={"messages": bad, "stream": True, "n": 2})
            if code == 500 and word != "CRASH-ADD":  # in the middle: the status has been sent, the error is an event and the last
                *chunks, last = events(streamed.text)
                assert streamed.status_code == 200 and set(last) == {"error"} and last["error"]["type"] == "server_error"
                assert "secret" not in streamed.text and all("choices" in c for c in chunks)
            else:
                assert streamed.status_code == code
            assert (await client.post(URL, json={"messages": HI})).status_code == 200
            assert (await client.get("/health")).status_code == 200
            await settled(engine, client.app.state.service)

    asyncio.run(one())


def test_a_fault_of_the_servers_own_does_not_end_the_thread(monkeypatch):
    engine = FakeEngine()

    async def one() -> None:
        async with connected(engine) as client:
            service = client.app.state.service
            monkeypatch.setattr(service.telemetry, "stepped", lambda *_: 1 / 0)
            assert (await client.post(URL, json={"messages": HI})).status_code == 500
            monkeypatch.undo()
            assert (await client.post(URL, json={"messages": HI})).status_code == 200
            await settled(engine, service)

    asyncio.run(one())


def test_loading_and_shutting_down():
    """/ready is 503 while the model is loaded and when nothing new is taken; /health is not."""
    loaded = threading.Event()

    def load() -> FakeEngine:
        loaded.wait(10)
        return FakeEngine(lambda *_: "x" * 20 + "<|end|>", delay=0.002)

    async def one() -> None:
        import httpx

        made = app(load, Options())
        async with (
            made.router.lifespan_context(made),
            httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://x") as client,
        ):
            service = made.state.service
            for path in ("/ready", "/v1/models"):
                assert (await client.get(path)).status_code == 503
            loading = await client.post(URL, json={"messages": HI})
            assert loading.status_code == 503 and loading.json()["error"]["type"] == "unavailable_error"
            assert loading.headers["retry-after"] and (await client.post("/tokenize", json={"prompt": "x"})).status_code == 503
            assert (await client.get("/health")).status_code == 200 and (await client.get("/metrics")).status_code == 200
            loaded.set()
            while not service.ready:
                await asyncio.sleep(0.001)
            assert (await client.get("/ready")).status_code == 200
            running = asyncio.create_task(client.post(URL, json={"messages": HI}))
            while not service.jobs:
                await asyncio.sleep(0.001)
            service.draining = True
            assert (await client.get("/ready")).status_code == 503
            assert (await client.post(URL, json={"messages": HI})).status_code == 503
            assert (await running).status_code == 200  # what runs has its time
            service.draining = False
            cut = asyncio.create_task(client.post(URL, json={"messages": HI, "stream": True, "ignore_eos": True}))
            while not service._live:
                await asyncio.sleep(0.001)
            service.stop()
            assert events((await cut).text)[-1]["error"]["type"] == "unavailable_error"
            await service.join()
            assert (await client.get("/health")).status_code == 503

    asyncio.run(one())


def test_a_stream_that_has_nothing_to_say_pings():
    """serving.md D: comments during a long prefill are legal and keep the connection open."""

    async def one() -> None:
        async with connected(FakeEngine(delay=0.05), ping_seconds=0.01) as client:
            text = (await client.post(URL, json={"messages": HI, "stream": True, "max_tokens": 2})).text
            assert ": ping\n\n" in text and events(text)[-1] == "[DONE]"

    asyncio.run(one())


def test_rendering_does_not_stop_the_others():
    """CVE-2025-62426: rendering and tokenising in the event loop blocked everybody; here they run in threads, a few at once."""

    async def one() -> None:
        async with connected(FakeEngine()) as client:
            answers = client.app.state.answers
            held, now, most = threading.Event(), 0, 0

            def slow(_: Any) -> list[int]:
                nonlocal now, most
                now, most = now + 1, max(most, now + 1)
                held.wait(10)
                now -= 1
                return [5]

            answers.chat_prompt = slow
            tasks = [asyncio.create_task(client.post(URL, json={"messages": HI})) for _ in range(6)]
            while now < 2:
                await asyncio.sleep(0.001)
            assert (await client.get("/health")).status_code == 200 and not any(t.done() for t in tasks)
            held.set()
            assert [a.status_code for a in await asyncio.gather(*tasks)] == [200] * 6 and most == 2

    asyncio.run(one())


def test_the_pages_stream():
    """What the chat page uses: pieces in this process, the usage at the end, cancelled on close, BadInput for what is wrong."""
    engine = FakeEngine(lambda *_: "a b</think>c d<|end|>", delay=0.001)

    async def one() -> None:
        async with connected(engine, max_queue=2) as client:
            answers, service = client.app.state.answers, client.app.state.service
            settings: dict[str, Any] = {"temperature": 0.0, "top_p": 0.9, "max_tokens": 50, "thinking": True, "seed": 3}
            pairs = [p async for p in answers.stream_chat(HI, **settings, max_thinking_tokens=None)]
            assert "".join(p for k, p in pairs if k == "reasoning") == "a b" and "".join(p for k, p in pairs if k == "content") == "c d"
            assert pairs[-1][0] == "end" and pairs[-1][1]["finish_reason"] == "stop" and pairs[-1][1]["completion_tokens"] == 8
            assert engine.added[0].sampling.seed == 3
            stream = answers.stream_chat(HI, **settings)
            await anext(stream)
            await stream.aclose()
            await settled(engine, service)
            assert engine.cancelled == 1
            for bad in ({"temperature": 9}, {"messages_": 1, "max_tokens": 0}):
                with pytest.raises(BadInput):
                    await anext(answers.stream_chat(HI, **bad))
            service.waiting += 2
            with pytest.raises(BadInput, match="queue"):
                await anext(answers.stream_chat(HI))
            service.waiting -= 2
            with pytest.raises(ApiError):
                async for _ in answers.stream_chat(POISON):
                    pass
            await settled(engine, service)

    asyncio.run(one())
