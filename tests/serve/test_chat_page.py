"""The chat page in a real browser, over a backend that says what is written down here. Skipped where there is no Chromium."""

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scripted import Scripted, usage

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HOSTILE = (
    "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'> <b>bold</b> ![i](http://192.0.2.1/x.png)\n"
    "[link](javascript:window.hurt=1)\n\n```html\n<iframe src='http://192.0.2.1'></iframe>\n```\n<!-- </think> -->"
)
LONG = "x" * 300 + " | " + "word " * 60 + "\n```\n" + "y" * 400 + "\n```"
SCRIPTS: dict[str, Any] = {
    "sum": [("reasoning", "two and "), ("wait", 1.2), ("reasoning", "two"), ("content", "It is\n\n**4**"), usage(12)],
    "again": [("reasoning", "the same"), ("wait", 0.3), ("content", "Still 4"), usage(6)],
    "endless": [("reasoning", "on and "), ("wait", 0.3), ("reasoning", "on"), ("wait", 600), usage(1)],
    "slow answer": [("content", "half an ans"), ("wait", 600), ("content", "wer"), usage(1)],
    "hostile": [("reasoning", HOSTILE), ("content", HOSTILE), usage(9)],
    "long": [("reasoning", LONG), ("content", LONG), usage(9)],
    "broken": [("content", "a"), ("raise", RuntimeError("secret"))],
    "vote": [
        [("reasoning", "a"), ("wait", 0.2), ("content", "It is 5"), usage(10)],
        [("reasoning", "b"), ("content", "Answer: 4"), usage(20)],
        [("reasoning", "c"), ("wait", 0.4), ("content", "**4**"), usage(30)],
        [("reasoning", "d"), usage(40, "length")],
    ],
}
# The browser asks for these at the host's root, where a proxy may have others or none; nothing needs them.
ASIDE = r"http://127\.0\.0\.1:\d+/(favicon\.ico|manifest\.json)"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of `app`, served by a thread of this process."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(20)


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Scripted]]:
    from fastapi import FastAPI

    from pascaline.serve import chat

    app, backend = FastAPI(), Scripted(SCRIPTS)
    chat.mount(app, backend)
    with serving(app) as address:
        yield address, backend


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """An open chat page. Leaving it fails if the console told of an error, or anything left this machine."""

    def __init__(self, browser: Any, address: str, viewport: dict[str, int] = DESK, **options: Any) -> None:
        self.wrong: list[str] = []
        self.page = browser.new_context(viewport=viewport, **options).new_page()
        self.page.on("console", lambda m: m.type == "error" and not re.fullmatch(ASIDE, m.location["url"]) and self.wrong.append(m.text))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or self.wrong.append(r.url))
        self.page.on("response", lambda r: r.status < 400 or self.wrong.append(f"{r.status} {r.url}"))
        self.page.goto(address)
        self.box = self.page.locator("#box textarea")
        self.box.wait_for()
        self.page.wait_for_timeout(400)  # the panel slides in

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.page.context.close()
        assert kind or not self.wrong, self.wrong

    def ask(self, question: str, state: str = "done") -> Any:
        """Ask; the last branch, once it is in that state."""
        before = self.page.locator(".turn").count()
        self.box.fill(question)
        self.box.press("Enter")
        self.page.locator(".turn").nth(before).wait_for()
        branch = self.page.locator(".branch").last
        self.page.wait_for_function("s => [...document.querySelectorAll('.branch')].at(-1)?.dataset.state === s", arg=state)
        return branch

    def stop(self) -> None:
        self.page.locator("#box .stop-button").click()

    def set(self, name: str, value: str) -> None:
        field = self.page.locator(f"#{name} input[type=number], #{name} textarea").first
        field.fill(value)
        field.press("Tab")


def test_the_thought_streams_open_and_closes_with_its_seconds(served, browser) -> None:
    with Page(browser, served[0]) as page:
        branch = page.ask("sum", "thinking")
        thought = branch.locator("details")
        assert thought.get_attribute("open") is not None and branch.locator(".thought-text").inner_text() == "two and"
        assert branch.locator("summary").inner_text().startswith("Thinking...")
        assert page.box.input_value() == "", "the question left the box"
        page.page.wait_for_selector(".branch[data-state=done]")
        assert thought.get_attribute("open") is None
        assert re.fullmatch(r"Thought for \d+ s", branch.locator("summary").inner_text())
        assert branch.locator(".answer strong").inner_text() == "4"
        branch.locator("summary").click()
        assert branch.locator(".thought-text").inner_text() == "two and two"


def test_every_round_keeps_its_own_thought_and_the_model_reads_none(served, browser) -> None:
    """Complaint C 6 (open-webui #24697: the reasoning was dropped after the first round)."""
    with Page(browser, served[0]) as page:
        page.set("system", "Be brief.")
        page.ask("sum")
        page.page.locator("summary").first.click()
        page.ask("again")
        texts = page.page.locator(".thought-text").all_text_contents()
        assert texts == ["two and two", "the same"]
        assert page.page.locator("details").first.get_attribute("open") is not None, "what the reader opened stays open"
        messages, settings = served[1].asked[-1]
        assert [(m["role"], m["content"]) for m in messages] == [
            ("system", "Be brief."), ("user", "sum"), ("assistant", "It is\n\n**4**"), ("user", "again"),
        ]  # fmt: skip
        page.page.locator("#thinking input").uncheck()
        page.ask("again")
        assert served[1].asked[-1][1] == {**settings, "thinking": False}
        assert settings == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 2048, "thinking": True, "max_thinking_tokens": None, "seed": 0}


@pytest.mark.parametrize(("question", "state", "kept"), [("endless", "thinking", "on and on"), ("slow answer", "answering", "half an ans")])
def test_stop_stops_the_backend_and_keeps_what_was_said(served, browser, question: str, state: str, kept: str) -> None:
    """Complaint C 7 (llama.cpp #25055: the backend went on; unsloth #5563: the message vanished)."""
    backend = served[1]
    with Page(browser, served[0]) as page:
        before = backend.cancelled
        branch = page.ask(question, state)
        until(lambda: kept in branch.inner_text())
        page.stop()
        page.page.wait_for_selector(".branch[data-state=stopped]")
        assert (backend.running, backend.cancelled) == (0, before + 1)
        assert kept in branch.inner_text() and "stopped" in branch.inner_text()
        page.ask("again")
        assert kept in page.page.locator(".branch").first.inner_text(), "the next question must not wipe it out"


@pytest.mark.parametrize("leave", ["close", "new"])
def test_leaving_and_a_new_chat_stop_the_backend_too(served, browser, leave: str) -> None:
    backend = served[1]
    with Page(browser, served[0]) as page:
        page.ask("endless", "thinking")
        if leave == "new":
            page.page.locator("#new").click()
            page.page.wait_for_selector(".empty")
            until(lambda: backend.running == 0)
            page.page.wait_for_timeout(300)
            assert page.page.locator(".turn").count() == 0, "what the old chat still said must not come back"
            page.ask("again")
            assert [m["role"] for m in backend.asked[-1][0]] == ["user"]
    until(lambda: backend.running == 0)


def test_a_vote_shows_its_branches_their_tally_and_what_it_took(served, browser) -> None:
    with Page(browser, served[0]) as page:
        page.set("k", "4")
        page.ask("vote", "cut")
        page.page.locator(".branch.wins", has_text="winner").wait_for()
        assert [b.get_attribute("data-state") for b in page.page.locator(".branch").all()] == ["done", "done", "done", "cut"]
        rows = [row.inner_text().split("\n") for row in page.page.locator(".vote").all()]
        assert [[row[0], row[-1]] for row in rows] == [["4", "2 votes (2, 3)"], ["it is 5", "1 vote (1)"]]
        assert "4 ended, 100 tokens" in page.page.locator(".tally-head").inner_text()
        assert "Branch 2" in page.page.locator(".branch.wins").inner_text()
        assert page.page.locator(".branch details").count() == 4
        page.set("k", "1")
        page.ask("again")
        assert served[1].asked[-1][0][1]["content"] == "Answer: 4", "the conversation goes on with the winner"


def test_what_the_model_says_never_becomes_html(served, browser) -> None:
    with Page(browser, served[0]) as page:
        branch = page.ask("hostile")
        assert page.page.evaluate("window.hurt") is None
        assert page.page.locator("#talk :is(img, script, iframe, a, b)").count() == 0
        assert "<script>window.hurt = 1</script><img src=x" in branch.locator(".answer").inner_text()
        assert branch.locator(".answer pre").inner_text() == "<iframe src='http://192.0.2.1'></iframe>"


def test_an_error_is_one_sentence_and_the_page_goes_on(served, browser) -> None:
    with Page(browser, served[0]) as page:
        branch = page.ask("broken", "failed")
        assert "The server failed on this answer." in branch.inner_text() and "secret" not in page.page.content()
        page.ask("again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(served, browser, scheme) -> None:
    with Page(browser, served[0], PHONE, color_scheme=scheme) as page:
        page.ask("long")
        page.page.locator("#panel .toggle-button").click()
        page.page.wait_for_timeout(400)
        page.set("k", "4")
        page.page.locator("#panel .toggle-button").click()
        page.ask("vote", "cut")
        page.page.locator(".branch.wins", has_text="winner").wait_for()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.page.evaluate("document.documentElement.scrollHeight - innerHeight - scrollY") <= 2, "what is new is in sight"
        for to in ("document.body.scrollHeight", "0"):
            page.page.evaluate(f"scrollTo(0, {to})")
            box = page.page.locator("#box").bounding_box()
            assert PHONE["height"] - 100 < box["y"] + box["height"] <= PHONE["height"], "the box stays in sight, at the bottom"
        background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(c) for c in background[4:-1].split(",")) < 200) == (scheme == "dark")


def proxy(target: list[str], prefix: str) -> Any:
    """An application that passes on what is below `prefix`, without it, to the address in `target`, as a web server would."""
    import httpx
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    async def passed(request: Request) -> StreamingResponse:
        client = httpx.AsyncClient(timeout=60)
        headers = {"host": request.headers["host"], "x-forwarded-prefix": prefix, "content-type": request.headers.get("content-type", "")}
        url = target[0] + request.path_params["path"] + "?" + request.url.query
        sent = client.build_request(request.method, url, headers=headers, content=await request.body())
        answer = await client.send(sent, stream=True)
        kept = {
            name: value for name, value in answer.headers.items() if name not in ("content-length", "content-encoding", "transfer-encoding")
        }
        return StreamingResponse(answer.aiter_bytes(), answer.status_code, kept)

    return Starlette(routes=[Route(prefix + "/{path:path}", passed, methods=["GET", "POST"])])


@pytest.mark.parametrize("prefix", ["", "/models/demo"])
def test_the_page_of_the_real_server_at_its_root_and_behind_a_proxy(browser, prefix: str) -> None:
    import httpx
    from fake import FakeEngine

    from pascaline.serve import api, chat
    from pascaline.serve.options import Options

    said = "first <i>this</i></think>The answer is 12.<|end|>"
    engine = FakeEngine(lambda prompt, index: "on and on" if "FOREVER" in prompt else said, delay=0.005)
    with serving(api.app(engine, Options(name="demo"), chat.mount)) as own, serving(proxy([own], prefix)) as outside:
        address = outside.rstrip("/") + prefix + "/"
        until(lambda: httpx.get(own + "ready").status_code == 200)
        with Page(browser, address) as page:
            branch = page.ask("How many?")
            assert branch.locator(".answer").inner_text() == "The answer is 12."
            branch.locator("summary").click()
            assert branch.locator(".thought-text").inner_text() == "first <i>this</i>"
            assert "think>" not in page.page.locator("body").inner_text(), "no tag is shown raw"
            page.ask("FOREVER", "thinking")
            page.stop()
            page.page.wait_for_selector(".branch[data-state=stopped]")
            until(lambda: engine.empty)
            assert engine.cancelled == 1, "the engine itself has stopped"
        assert httpx.get(own + "v1/models").json()["data"][0]["id"] == "demo"
        assert httpx.get(own + "nope").json()["error"]["message"], "what is no page's is an error object of the API"
        assert httpx.get(own + "gradio_api/info").json()["error"]["message"]


def test_another_site_cannot_use_the_page(served) -> None:
    import httpx

    foreign = {"origin": "http://192.0.2.7", "host": "models.example:80", "sec-fetch-site": "cross-site"}
    body = {"fn_index": 0, "session_hash": "x", "data": ["sum", {}, "", 1, 0.6, 0.95, 64, True, 0, 0]}
    assert httpx.post(served[0] + "gradio_api/queue/join", json=body, headers=foreign).status_code == 403
    page = httpx.get(served[0], headers=foreign)  # somebody followed a link
    assert page.status_code == 200 and not [name for name in page.headers if name.startswith("access-control")]


def test_the_rest_of_gradio_is_not_served(served) -> None:
    import httpx

    address = served[0]
    page = httpx.get(address)
    assert "frame-ancestors 'self'" in page.headers["content-security-policy"]
    for route in ("info", "file=/etc/passwd", "proxy=http://192.0.2.1/", "openapi.json", "call/ask", "monitoring"):
        path = "gradio_api/" + route
        assert httpx.get(address + path).status_code == 404, path
    assert httpx.post(address + "gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert httpx.get(address + "assets/../../../../../../etc/passwd").status_code in (404, 403)
    assert httpx.get(address + "assets/..%2f..%2f..%2f..%2fetc%2fpasswd").status_code in (404, 403)
