"""Sizes, keys, rates and what is logged."""

import asyncio
import logging
from pathlib import Path

import httpx
import pytest
from fake import FakeEngine, connected
from test_chat_completions import HI, URL

from pascaline.errors import BadInput
from pascaline.serve.limits import escaped, read_keys
from pascaline.serve.options import Options, default_name, read_size

KEYS = ("sk-first-key", "sk-second-key")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who has which\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    return path


def test_every_route_but_health_needs_a_key(key_file):
    """serving.md C, authentication: a key that guards /v1 only left other routes open; here every path is closed unless it is /health,
    the ones that do not exist too, in any case and method."""

    async def one():
        async with connected(FakeEngine(), api_key_file=key_file) as client:
            routes = {(m, r.path) for r in client.app.routes for m in r.methods if r.path != "/health"}
            assert ("POST", URL) in routes and ("GET", "/metrics") in routes and ("GET", "/openapi.json") in routes and len(routes) >= 10
            odd = {(m, p) for m in ("GET", "POST", "PUT", "OPTIONS", "X") for p in ("/", "/nope", "//health", "/health/", "/HEALTH")}
            for method, path in routes | odd:
                for headers in ({}, {"authorization": "Bearer sk-first-ke"}, {"authorization": f"Basic {KEYS[0]}"}, {"x-key": KEYS[0]},
                                {"authorization": KEYS[0]}, {"authorization": "Bearer "},
                                {"authorization": b"Bearer \xff\xfe"}):  # fmt: skip
                    answer = await client.request(method, f"http://localhost{path}", headers=headers)
                    assert answer.status_code == 401, (method, path, headers)
                    assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/health")).status_code == 200
            for key in KEYS:
                assert (await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 200
                assert (await client.get("/v1/models", headers={"authorization": f"bearer {key}"})).status_code == 200

    asyncio.run(one())


def test_keys_are_compared_in_constant_time_all_of_them(key_file, monkeypatch):
    """CVE-2025-59425: a comparison that ends at the first difference tells the key by its time."""
    import hmac

    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))

    async def one():
        async with connected(FakeEngine(), {"authorization": f"Bearer {KEYS[0]}"}, api_key_file=key_file) as client:
            assert (await client.get("/version")).status_code == 200

    asyncio.run(one())
    assert compared == [key.encode() for key in KEYS]


def test_tenants_do_not_share_prefixes(key_file):
    """CVE-2025-46570: who shares a prefix cache with a stranger can time what the stranger has asked."""
    engine = FakeEngine()

    async def one():
        async with connected(engine, api_key_file=key_file) as client:
            for key in (*KEYS, KEYS[0]):
                assert (await client.post(URL, json={"messages": HI}, headers={"authorization": f"Bearer {key}"})).status_code == 200

    asyncio.run(one())
    first, second, third = (r.salt for r in engine.added)
    assert first == third != second and first and KEYS[0] not in first


def test_bad_key_files_are_named(tmp_path):
    for text in ("", "# none\n", "short\n", "with blank inside\n", "schlüssel-lang\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(BadInput, match="api-key-file"):
            read_keys(tmp_path / "keys")
    with pytest.raises(BadInput, match="No such file"):
        read_keys(tmp_path / "absent")


def test_bodies_that_are_too_large():
    """With a length, without one, and with one that lies; the sender alone is refused and the rest is not read."""

    async def one():
        async with connected(FakeEngine(), max_body=2000) as client:
            read = 0

            async def endless():
                nonlocal read
                while True:
                    read += 1
                    yield b"x" * 500

            for body in (b"x" * 2001, endless()):
                answer = await client.post(URL, content=body)
                assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
            assert read < 8
            assert (await client.post(URL, json={"messages": HI})).status_code == 200

    asyncio.run(one())


def test_a_body_that_never_arrives_is_given_up():
    async def one():
        async with connected(FakeEngine(), body_seconds=0.05) as client:

            async def slow():
                yield b"{"
                await asyncio.sleep(30)

            answer = await client.post(URL, content=slow())
            assert answer.status_code == 408

    asyncio.run(one())


def test_headers_that_are_too_large():
    """CVE-2025-48956: huge headers."""

    async def one():
        async with connected(FakeEngine(), max_headers=2000) as client:
            for name in ("x-a", "authorization", "cookie"):
                answer = await client.get("/v1/models", headers={name: "x" * 3000})
                assert answer.status_code == 400 and answer.json()["error"]["code"] == "headers_too_large"
            assert (await client.get("/v1/models?" + "x" * 3000)).status_code == 400
            assert (await client.get("/v1/models")).status_code == 200

    asyncio.run(one())


def test_only_json_is_read():
    """A form of a foreign web page can send text/plain without being asked; it must not be able to use a server on this machine."""

    async def one():
        async with connected(FakeEngine()) as client:
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
                answer = await client.post(URL, content=b'{"messages":[{"role":"user","content":"x"}]}', headers={"content-type": kind})
                assert answer.status_code == 400, kind
            preflight = await client.options(URL, headers={"origin": "http://evil", "access-control-request-method": "POST"})
            assert preflight.status_code == 405
            answer = await client.post(URL, json={"messages": HI}, headers={"origin": "http://evil"})
            assert not [name for name in answer.headers if name.startswith("access-control")]

    asyncio.run(one())


@pytest.mark.parametrize("keys", [False, True])
def test_a_page_takes_nothing_from_the_api(key_file, keys):
    """Mounted last it takes what is left, but no method of the API's paths; with keys it is not there, for it would be a way around."""
    from starlette.responses import PlainTextResponse

    from pascaline.serve.api import app

    engine = FakeEngine()
    made = app(engine, Options(api_key_file=key_file if keys else None), lambda made, _: made.mount("/", PlainTextResponse("page")))
    headers = {"authorization": f"Bearer {KEYS[0]}"} if keys else {}

    async def one():
        transport = httpx.ASGITransport(made)
        async with (
            made.router.lifespan_context(made),
            httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client,
        ):
            assert ((await client.get("/")).text == "page") != keys
            assert ((await client.get("/other")).text == "page") != keys
            assert (await client.get("/version")).json()["version"]
            for method, path in (("GET", URL), ("DELETE", "/v1/models"), ("POST", "/metrics"), ("OPTIONS", URL), ("PUT", "/v1/models/a/b")):
                answer = await client.request(method, path)
                assert answer.status_code == 405 and answer.headers["allow"] == ("POST" if path == URL else "GET")
                assert answer.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(one())


def test_a_full_queue():
    """serving.md C 13: a queue without end grew until the memory was full; here answers and prompt tokens are counted: 429."""

    async def one():
        engine = FakeEngine(lambda *_: "x" * 50, rows=1, delay=0.002)
        async with connected(engine, max_queue=3, max_queue_tokens=100) as client:
            body = {"messages": HI, "max_tokens": 200}
            running = [asyncio.create_task(client.post(URL, json=body))]
            service = client.app.state.service
            while not engine.running:
                await asyncio.sleep(0.001)
            while service.waiting:
                await asyncio.sleep(0.001)
            running += [asyncio.create_task(client.post(URL, json=body)) for _ in range(3)]
            while service.waiting < 3:
                await asyncio.sleep(0.001)
            for more in ({}, {"stream": True}, {"n": 4}):
                answer = await client.post(URL, json={**body, **more})
                assert answer.status_code == 429 and answer.json()["error"]["type"] == "rate_limit_error", answer.text
                assert int(answer.headers["retry-after"]) >= 1 and answer.headers["content-type"] == "application/json"
            assert (await client.get("/health")).status_code == 200
            assert [a.status_code for a in await asyncio.gather(*running)] == [200] * 4
            long = await client.post(URL, json={**body, "messages": [{"role": "user", "content": "é" * 80}]})
            assert long.status_code == 429 and "prompt tokens" in long.json()["error"]["message"]
            assert service.waiting == service.waiting_tokens == 0

    asyncio.run(one())


def test_rate_and_concurrency_of_a_key(key_file):
    async def one():
        engine = FakeEngine(lambda *_: "x" * 50, delay=0.002)
        async with connected(engine, api_key_file=key_file, rate=3, concurrency=1) as client:
            one, two = ({"authorization": f"Bearer {key}"} for key in KEYS)
            body = {"messages": HI, "max_tokens": 100}
            task = asyncio.create_task(client.post(URL, json=body, headers=one))
            while not engine.running:
                await asyncio.sleep(0.001)
            busy = await client.post(URL, json=body, headers=one)
            assert busy.status_code == 429 and busy.json()["error"]["code"] == "concurrency_limit_exceeded"
            assert (await client.post(URL, json={**body, "max_tokens": 1}, headers=two)).status_code == 200
            assert (await task).status_code == 200
            for _ in range(2):
                assert (await client.post(URL, json={**body, "max_tokens": 1}, headers=one)).status_code == 200
            spent = await client.post(URL, json={**body, "max_tokens": 1}, headers=one)
            assert spent.status_code == 429 and spent.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(spent.headers["retry-after"]) <= 21
            assert (await client.get("/v1/models", headers=one)).status_code == 200  # costs nothing
            assert (await client.post(URL, json={**body, "max_tokens": 1}, headers=two)).status_code == 200

    asyncio.run(one())


def test_limits_on_a_request():
    async def one():
        async with connected(FakeEngine(), max_prompt_tokens=20, max_tokens=10, max_n=2, max_messages=2) as client:
            for body, code in (
                ({"messages": [{"role": "user", "content": "é" * 20}]}, "context_length_exceeded"),
                ({"messages": HI, "max_tokens": 11}, None),
                ({"messages": HI, "n": 3}, None),
                ({"messages": HI * 3}, None),
            ):
                answer = await client.post(URL, json=body)
                assert answer.status_code == 400 and answer.json()["error"]["code"] == code and "limit of" in answer.text
            whole = (await client.post(URL, json={"messages": HI})).json()
            assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == 10

    asyncio.run(one())


def test_the_log_has_one_line_a_request_and_no_prompt(caplog):
    """serving.md C, log injection and privacy: CR, LF and control characters are escaped; what people write is not logged."""
    assert escaped("a\r\nINFO forged \x1b[2J\u2028é") == "a\\r\\nINFO forged \\x1b[2J\\u2028\\xe9"

    async def one():
        async with connected(FakeEngine()) as client:
            await client.get("/a%0d%0aINFO%20forged")
            await client.post(URL, json={"messages": [{"role": "user", "content": "my secret"}]})
            await client.post(URL, json={"messages": [{"role": "user", "content": "POISON my secret"}]})
            await client.post(URL, json={"messages": [{"role": "user", "content": "my secret"}], "temperature": 9})

    with caplog.at_level(logging.INFO):
        asyncio.run(one())
    assert any("\\r\\nINFO forged" in r.getMessage() for r in caplog.records)
    assert not any("\n" in r.getMessage() or "secret" in r.getMessage() for r in caplog.records)


def test_nothing_here_can_unpickle_run_or_fetch():
    """CVE-2025-32444, -29783, -30165, -47277, CVE-2024-11041, CVE-2026-3059 and more (pickle on sockets), CVE-2025-62164 and
    -24357 (tensors from a request), CVE-2025-9141 (eval), CVE-2025-66448 (code of a model's folder), CVE-2025-6242 (fetching)."""
    import ast

    import pascaline.serve

    banned = {
        "pickle",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
        "requests",
        "httpx",
        "urllib",
        "http",
        "aiohttp",
        "subprocess",
        "zmq",
        "yaml",
    }
    for path in Path(pascaline.serve.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not banned & {name.partition(".")[0] for name in names}, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path


def test_options_have_bounds():
    for bad in (
        {"port": 70000},
        {"max_queue": 0},
        {"max_body": -1},
        {"rate": -1},
        {"drain_seconds": -1},
        {"rate": float("nan")},
        {"name": "a\nb"},
    ):
        with pytest.raises(BadInput, match="--"):
            Options(**bad)
    assert read_size("2GiB") == 2 << 30 and read_size("1.5 MB") == 1_500_000 and read_size("77") == 77
    for text in ("", "x", "-1", "2 GiBs", "1e9"):
        with pytest.raises(BadInput, match="size"):
            read_size(text)
    assert default_name(Path("/runs/demo/model")) == "demo" and default_name(Path("/models/Qwen3 x")) == "Qwen3-x"


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch):
    """At overload half a megabyte of text in one request in ninety took a fifth of the throughput."""
    engine, read = FakeEngine(), []
    monkeypatch.setattr(engine.tokenizer, "prompt_ids", lambda *a, **k: read.append(a) or [5])
    monkeypatch.setattr(engine.tokenizer, "encode", lambda *a, **k: read.append(a) or [5])

    async def one():
        async with connected(engine) as client:
            long = "word " * 100_000
            for url, body in ((URL, {"messages": [{"role": "user", "content": long}]}), ("/v1/completions", {"prompt": long})):
                answer = await client.post(url, json=body)
                assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
            assert not read
            assert (await client.post(URL, json={"messages": HI})).status_code == 200

    asyncio.run(one())
    assert read
