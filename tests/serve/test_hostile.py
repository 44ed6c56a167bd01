"""Requests made to break the server, sent while a good one streams: each fails its sender alone, and the good one has its whole answer.

Over HTTP, on a real engine; what the routes say to each wrong field is tested beside them.
"""

import contextlib
import gzip
import json
import logging
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from live import Live, eventually, served
from tiny import talker, tiny_tokenizer

from pascaline.engine import Engine, Sampling

GOOD = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 120, "seed": 1, "temperature": 1.0, "ignore_eos": True}
CHAT, COMPLETION, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
HI = [{"role": "user", "content": "hi"}]
POISON = "Z"  # a token whose embedding is not a number
HUGE = (-(2**200), -(2**63) - 1, -(2**31), -1, 2**31, 2**53 + 1, 2**64, 2**200)


def chat(**fields) -> dict:
    return {"messages": HI, "max_tokens": 4, **fields}


@pytest.fixture(scope="module")
def live():
    tokenizer = tiny_tokenizer()
    model = talker(tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.encode(POISON)[0]] = float("nan")
    with served(Engine(model, tokenizer)) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> str:
    ((output,),) = Engine(talker(tiny_tokenizer()), tiny_tokenizer()).generate(
        [GOOD["messages"]], Sampling(1.0, max_tokens=120, seed=1, ignore_eos=True)
    )
    return f"{output.reasoning}|{output.text}"


@contextlib.contextmanager
def streaming(live: Live, expected: str):
    """A good request runs meanwhile, and its answer is what it is alone."""
    said = {"reasoning_content": "", "content": ""}
    begun = []

    def read() -> None:
        with httpx.stream("POST", live.url + CHAT, json={**GOOD, "stream": True}, timeout=60) as answer:
            for line in answer.iter_lines():
                begun.append(line)
                if line.startswith("data: {"):
                    for key, piece in json.loads(line[6:])["choices"][0]["delta"].items():
                        if key in said:
                            said[key] += piece

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        assert eventually(lambda: len(begun) > 2 or reading.done())
        yield
        reading.result(60)
    assert f"{said['reasoning_content']}|{said['content']}" == expected
    assert live.idle()


def refused(answer: httpx.Response, *codes: int) -> None:
    """An error object with one of the codes (default: 400), which tells nothing of the server's insides."""
    assert answer.status_code in (codes or (400,)), answer.text[:300]
    error = answer.json()["error"]
    assert isinstance(error["message"], str) and error["message"] and len(answer.text) < 2000
    assert not any(word in answer.text for word in ("Traceback", "0x", ".py", "site-packages"))


def post(live: Live, path: str, body: object, **more) -> httpx.Response:
    if isinstance(body, bytes | str):
        return httpx.post(
            live.url + path, content=body, headers={"content-type": "application/json"} | more.pop("headers", {}), timeout=60, **more
        )
    return httpx.post(live.url + path, json=body, timeout=60, **more)


# ---- what the model cannot compute -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_no_numbers(live, expected, stream):
    """vLLM #10234, #19661, SGLang #5984: NaN ended in a 500 for everybody or in JSON that none can read; CVE-2026-22778: an exception's
    text."""
    with streaming(live, expected):
        answer = post(live, CHAT, chat(messages=[{"role": "user", "content": f"a {POISON} b"}], stream=stream))
        assert "NaN" not in answer.text and "0x" not in answer.text
        if stream:
            assert answer.status_code == 200 and '"error"' in answer.text and "[DONE]" not in answer.text
        else:
            refused(answer, 500)
        wholes = [post(live, CHAT, chat(seed=3)).json()["choices"][0]["message"] for _ in range(2)]
        assert wholes[0] == wholes[1]


def test_logprobs_of_a_forbidden_token(live, expected):
    """vLLM #10234: a log-probability of minus infinity is not JSON."""
    a = tiny_tokenizer().encode("a")[0]
    with streaming(live, expected):
        answer = post(live, CHAT, chat(logit_bias={str(a): -100}, logprobs=True, top_logprobs=20, temperature=0))
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        assert answer.status_code == 200


# ---- text ------------------------------------------------------------------------------------------------------------

STOPS = ["(a+)+$", "((((((((((a*)*)*)*)*)*)*)*)*)*b", "\\", "\x00", "\u202e", "</think>", "<|end|>", "é" * 128, "a" * 256, "\ufffd", " "]


@pytest.mark.parametrize("stop", STOPS)
def test_hostile_stop_strings(live, expected, stop):
    """CVE-2025-48887 (a pattern that backtracks for ever), vLLM PR #34101: a stop string is text, not a pattern, and never a crash."""
    with streaming(live, expected):
        answer = post(live, CHAT, chat(stop=[stop], max_tokens=200, temperature=1.0, seed=2, thinking=False))
        assert answer.status_code == 200 and stop not in answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stop", ["", "a" * 100_000, ["a"] * 5, [""], [[]], {"a": 1}, [1]])
def test_stop_strings_that_are_refused(live, expected, stop):
    """CVE-2026-9540: no list without a bound."""
    with streaming(live, expected):
        refused(post(live, CHAT, chat(stop=stop)))


@pytest.mark.parametrize(
    "body",
    [
        '{"messages":[{"role":"user","content":"a\\ud800b"}]}',
        '{"messages":[{"role":"user","content":[{"type":"text","text":"\\udfff"}]}]}',
        '{"messages":[{"role":"assistant","content":"a","reasoning_content":"\\ud83d"}]}',
        '{"messages":[{"role":"user","content":"hi"}],"stop":"\\ud800"}',
        '{"messages":[{"role":"user","content":"hi"}],"model":"\\ud800"}',
        b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
        '{"messages":[{"role":"user","content":"hi"}],"logit_bias":{"\\ud800":1}}',
    ],
)
def test_text_that_is_not_unicode(live, expected, body):
    """exo #1691, vLLM #15044: half a surrogate pair ends in an exception deep inside the tokenizer or when the answer is written."""
    with streaming(live, expected):
        refused(post(live, CHAT, body), 400, 404)


@pytest.mark.parametrize(
    "unit", ["<|user|>", "<think></think>", "<", "{{ messages.__class__ }}", "{% for x in range(10**9) %}", "\ue000", "\n"]
)
def test_a_message_full_of_markup(live, expected, unit):
    """CVE-2025-46560: a scan for placeholders that is quadratic; CVE-2026-5760: a template in a message that is run. 2 MB of it is refused,
    because it is too long, and nobody waits."""
    with streaming(live, expected):
        refused(post(live, CHAT, chat(messages=[{"role": "user", "content": unit * (2_000_000 // len(json.dumps(unit)))}])))
        short = post(live, TOKENIZE, {"messages": [{"role": "user", "content": unit}]}).json()["tokens"]
        tokenizer = tiny_tokenizer()
        assert short == tokenizer.prompt_ids(unit) and short.count(tokenizer.user) == 1  # nobody forges a turn


# ---- sizes and numbers -----------------------------------------------------------------------------------------------

NESTED = {
    "list": "[" * 10_000_000,
    "list that fits": "[" * 4_000_000,
    "object": '{"a":' * 700_000,
    "closed": '{"messages":' + "[" * 500_000 + "]" * 500_000 + "}",
    "in a field that is ignored": '{"messages":[{"role":"user","content":"hi"}],"metadata":' + "[" * 100_000 + "]" * 100_000 + "}",
    "tools": '{"messages":[{"role":"user","content":"hi"}],"tools":[' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "]}",
    "digits": '{"messages":[{"role":"user","content":"hi"}],"seed":' + "9" * 1_000_000 + "}",
    "digits of a float": '{"messages":[{"role":"user","content":"hi"}],"temperature":0.' + "9" * 1_000_000 + "e99999999999}",
    "a number out of range": '{"messages":[{"role":"user","content":"hi"}],"temperature":1e999}',
    "NaN": '{"messages":[{"role":"user","content":"hi"}],"top_p":NaN}',
    "Infinity": '{"messages":[{"role":"user","content":"hi"}],"logit_bias":{"1":-Infinity}}',
    "keys": json.dumps({"messages": HI, "logit_bias": {str(i): 1 for i in range(200_000)}}),
    "messages": json.dumps({"messages": HI * 70_000}),
    "prompts": json.dumps({"prompt": ["a"] * 100_000}),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_json_without_end(live, expected, name, path):
    """CVE-2026-9540 and CVE-2025-48956: 10 MB of '[' and its like; Python's own CVE-2020-10735: a number of a million digits."""
    with streaming(live, expected):
        refused(post(live, path, NESTED[name]), 400, 413)


@pytest.mark.parametrize(
    "field",
    [
        "n",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "top_k",
        "top_logprobs",
        "seed",
        "max_thinking_tokens",
        "best_of",
        "logprobs",
    ],
)
def test_integers_have_two_bounds(live, expected, field):
    """llama.cpp CVE-2026-21869 (a negative n_discard wrote out of bounds), CVE-2026-34756 (n = 10^9)."""
    paths = {"best_of": [COMPLETION], "max_completion_tokens": [CHAT], "top_logprobs": [CHAT]}.get(field, [CHAT, COMPLETION])
    with streaming(live, expected):
        for path in paths:
            for value in (*HUGE, 1.5, "1", True, [1], {}):
                prompt = {"messages": HI} if path == CHAT else {"prompt": "hi"}
                most = {"max_tokens": 2} if not field.startswith("max_") else {}
                answer = post(live, path, {**prompt, **most, field: value})
                if answer.status_code != 200:
                    refused(answer)
                    continue
                told = answer.json()["usage"]["completion_tokens"]
                assert isinstance(value, int) and (told <= 2 or field.startswith("max_")), (field, value)  # a legal value after all


@pytest.mark.parametrize(
    "key", ["AI", "-1", "1.0", "", " 1", "٣", "1e3", "4294967296", "99999999999999999999", "297", "0x1", "null", "\x00"]
)
def test_logit_bias_keys(live, expected, key):
    """vLLM #5822 and PR #16529: "AI", and ids out of the vocabulary, killed the engine."""
    with streaming(live, expected):
        refused(post(live, CHAT, chat(logit_bias={key: 1})))


# ---- what is fetched, run or read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]}]},
        {"messages": [{"role": "user", "content": {"url": "http:\\\\127.0.0.1"}}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template_kwargs": {"messages": []}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+$"}}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"pattern": "("}}}]},
    ],
)  # fmt: skip
def test_nothing_is_fetched_and_nothing_is_run(live, expected, fields):
    """CVE-2025-6242 and CVE-2026-24779 (addresses that are fetched), CVE-2025-61620, CVE-2025-62426 and CVE-2026-5760 (arguments and
    sources of templates), CVE-2025-48942 to -48944 (schemas and patterns)."""
    with streaming(live, expected):
        refused(post(live, CHAT, chat(**fields)))


@pytest.mark.parametrize(
    "template", [{"chat_template": "{{ cycler.__init__.__globals__ }}"}, {"prompt_embeds": "gASV"}, {"guided_regex": "("}]
)
def test_fields_of_other_servers_do_nothing(live, expected, template):
    """CVE-2026-5760, CVE-2025-62164 (tensors in a request), CVE-2025-48943: unknown here, and so without any effect."""
    with streaming(live, expected):
        plain, more = (post(live, CHAT, chat(seed=3, **fields)).json()["choices"] for fields in ({}, template))
        assert plain == more


@pytest.mark.parametrize(
    "body, headers",
    [
        (pickle.dumps({"messages": HI}), {}),
        (gzip.compress(json.dumps({"messages": HI}).encode(), mtime=0), {"content-encoding": "gzip"}),
        (gzip.compress(b"[" * 100_000_000, mtime=0), {"content-encoding": "gzip"}),
        (json.dumps({"messages": HI}).encode("utf-16"), {}),
        (b"", {}),
        (b"\x00" * 100, {}),
        (b"null", {}),
        (b'"messages"', {}),
    ],
)
def test_bodies_of_another_kind(live, expected, body, headers):
    """CVE-2025-32444 and -29783 (pickles that are read), and a gzip that grows to 100 MB: JSON is read, and nothing else."""
    with streaming(live, expected):
        answer = post(live, CHAT, body, headers=headers)
        if answer.status_code != 200:  # JSON may be in UTF-16
            refused(answer, 400, 415)
        else:
            assert body[:2] in (b"\xff\xfe", b"\xfe\xff")


# ---- the wire --------------------------------------------------------------------------------------------------------

LINE = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WIRE = {
    "a huge header": LINE + b"X: " + b"a" * 1_000_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "many headers": LINE + b"".join(b"X-%d: a\r\n" % i for i in range(50_000)) + b"Content-Length: 0\r\n\r\n",
    "a huge path": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n",
    "two lengths": LINE + b"Content-Length: 2\r\nContent-Length: 200\r\n\r\n{}",
    "a length below zero": LINE + b"Content-Length: -1\r\n\r\n{}",
    "a length that is huge": LINE + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    "a length and chunks": LINE + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a chunk that is huge": LINE + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{}",
    "control characters": b"GET /v1/mod\x1b[31mels HTTP/1.1\r\nHost: x\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", WIRE)
def test_what_is_no_request(live, expected, name):
    """CVE-2025-48956 (huge headers) and its like, on a bare socket: 4xx or a closed connection."""
    closed = contextlib.suppress(ConnectionError)  # the server may close before all is sent
    with streaming(live, expected), socket.create_connection(("127.0.0.1", live.port), 30) as wire, closed:
        wire.sendall(WIRE[name])
        with contextlib.suppress(OSError):  # it has closed already
            wire.shutdown(socket.SHUT_WR)
        first = wire.makefile("rb").readline()
        assert first == b"" or 400 <= int(first.split()[1]) < 500 or (first, name) == (b"HTTP/1.1 200 OK\r\n", "control characters")


def test_half_requests_hold_nobody_up(live, expected):
    """vLLM #18826 and slow clients: a hundred connections that never say the end of their request."""
    with contextlib.ExitStack() as stack, streaming(live, expected):
        for _ in range(100):
            wire = stack.enter_context(socket.create_connection(("127.0.0.1", live.port), 30))
            wire.sendall(LINE + b"Content-Length: 100\r\n\r\n{")
        assert post(live, CHAT, chat()).status_code == 200


def test_the_log_is_one_line_of_ascii_a_request(live, expected, caplog):
    """nanochat logged what clients sent as it was: a line break in a path forges a line, an escape sequence steers the operator's
    terminal."""
    with caplog.at_level(logging.INFO, logger="pascaline"), streaming(live, expected):
        for path in ("/v1/%0d%0aINFO%20forged", "/%1b%5B2J", "/v1/models/%00%0a", "/v1/models/%E2%80%AE%C2%85"):
            refused(httpx.get(live.url + path), 404)
        post(live, CHAT, chat(model="a\nforged line\x1b[2J", user="x\ny"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) >= 5 and all(line.isascii() and line.isprintable() for line in said)
    assert not any("the cat" in line or "forged line" in line for line in said)
