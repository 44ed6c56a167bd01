"""Chats: the exact format, whole and streamed, of thought, text, usage, log-probabilities and errors."""

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake import FakeEngine, connected, requests_of
from hypothesis import given, settings
from hypothesis import strategies as st

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def ask(engine: FakeEngine, body: dict[str, Any], url: str = URL, **options: Any) -> Any:
    """The response to one request."""

    async def one() -> Any:
        async with connected(engine, **options) as client:
            return await answered(client, engine, body, url)

    return asyncio.run(one())


async def answered(client: Any, engine: FakeEngine, body: dict[str, Any], url: str = URL) -> Any:
    answer = await client.post(url, json=body)
    for _ in range(300):  # what is cancelled is so before the engine's next step, not before the answer
        if engine.empty:
            break
        await asyncio.sleep(0.01)
    assert engine.empty and not client.app.state.service.jobs
    return answer


def events(text: str) -> list[Any]:
    """The data of a stream's events; all of it must be events or comments."""
    found = []
    for block in text.split("\n\n")[:-1]:
        assert block.startswith(("data: ", ":")) and "\n" not in block
        if block.startswith("data: "):
            found.append(block[6:] if block == "data: [DONE]" else json.loads(block[6:]))
    assert text.endswith("\n\n")
    return found


def streamed(engine: FakeEngine, **body: Any) -> list[Any]:
    return streamed_in(ask(engine, {"messages": HI, "stream": True, **body}))


def streamed_in(answer: Any) -> list[Any]:
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def joined(chunks: list[Any], index: int = 0) -> tuple[str, str]:
    deltas = [c["choices"][0]["delta"] for c in chunks if c != "[DONE]" and c["choices"] and c["choices"][0]["index"] == index]
    return "".join(d.get("reasoning_content", "") for d in deltas), "".join(d.get("content", "") for d in deltas)


def test_a_whole_answer_field_by_field():
    answer = ask(FakeEngine(), {"model": "model", "messages": HI, "user": "x", "store": True, "logit_bias": {}, "metadata": {"a": 1}})
    said = answer.json()
    assert set(said) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert said["object"] == "chat.completion" and said["id"].startswith("chatcmpl-") and said["model"] == "model"
    (choice,) = said["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "The answer is 12.", "reasoning_content": "I think."},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage, own = said["usage"], FakeEngine().tokenizer
    assert usage["prompt_tokens"] == len(own.prompt_ids("hi")) and usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(own.encode("I think.")) + 1
    assert usage["completion_tokens"] == len(own.encode("I think.")) + 1 + len(own.encode("The answer is 12.")) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_field_by_field():
    """serving.md D: role first, finish_reason null until the last and never "", no usage unless asked for, [DONE]; C 5: no null deltas."""
    chunks = streamed(FakeEngine())
    assert chunks.pop() == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"} and all("usage" not in c for c in chunks)
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    choices = [c["choices"] for c in chunks]
    assert all(len(c) == 1 for c in choices)
    first, *middle, last = (c[0] for c in choices)
    assert first["delta"] == {"role": "assistant", "content": ""} and last["delta"] == {} and last["finish_reason"] == "stop"
    assert all(c["finish_reason"] is None for c in (first, *middle))
    names = [name for c in middle for name in c["delta"]]
    assert all(len(c["delta"]) == 1 and all(c["delta"].values()) for c in middle)
    assert names == sorted(names, reverse=True) and set(names) == {"reasoning_content", "content"}  # the thought comes first
    assert joined(chunks) == ("I think.", "The answer is 12.")


def test_usage_in_a_stream_if_asked_for():
    chunks = streamed(FakeEngine(), stream_options={"include_usage": True})
    assert chunks.pop() == "[DONE]"
    assert all(c["usage"] is None for c in chunks[:-1]) and chunks[-1]["choices"] == []
    whole = ask(FakeEngine(), {"messages": HI}).json()["usage"]
    assert chunks[-1]["usage"] == whole


def test_thoughts_under_a_second_name_if_wanted():
    """serving.md D: vLLM and OpenRouter call it `reasoning`."""
    said = ask(FakeEngine(), {"messages": HI}, mirror_reasoning=True).json()["choices"][0]["message"]
    assert said["reasoning"] == said["reasoning_content"] == "I think."
    chunks = events(ask(FakeEngine(), {"messages": HI, "stream": True}, mirror_reasoning=True).text)
    deltas = [c["choices"][0]["delta"] for c in chunks[:-1]]
    assert "".join(d.get("reasoning", "") for d in deltas) == "I think." == joined(chunks)[0]


def test_several_answers_interleave_by_index():
    engine = FakeEngine(lambda prompt, i: f"thought {i}</think>text {i}<|end|>")
    chunks = streamed(engine, n=3, seed=5)
    order = [c["choices"][0]["index"] for c in chunks[:-1]]
    assert order[:6] == [0, 1, 2, 0, 1, 2] and set(order) == {0, 1, 2}
    for i in range(3):
        assert joined(chunks, i) == (f"thought {i}", f"text {i}")
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == i]
        assert [c["finish_reason"] for c in mine].count("stop") == 1 and mine[-1]["finish_reason"] == "stop"
    whole = ask(engine, {"messages": HI, "n": 3}).json()
    assert [(c["index"], c["message"]["content"]) for c in whole["choices"]] == [(0, "text 0"), (1, "text 1"), (2, "text 2")]
    prompt = len(engine.tokenizer.prompt_ids("hi"))
    assert whole["usage"]["prompt_tokens"] == prompt and whole["usage"]["completion_tokens"] > 3 * 5


SAID = st.lists(st.sampled_from(["<think>", "</think>", "</thi", "STOP", "ST", "é", "日", "\n", " ", "a", "12"]), max_size=12).map("".join)


@pytest.fixture(scope="module")
def standing() -> Iterator[Callable[..., Any]]:
    """post(said, body) -> the answer of one server that stands for many requests: making one takes far longer than an answer."""
    engine = FakeEngine()
    with asyncio.Runner() as runner:
        server = connected(engine)
        client = runner.run(server.__aenter__())

        def post(said: str, body: dict[str, Any]) -> Any:
            engine.say = lambda *_: said
            return runner.run(answered(client, engine, body))

        yield post
        runner.run(server.__aexit__(None, None, None))


@settings(max_examples=60, deadline=None)
@given(said=SAID, stop=st.sampled_from([None, "STOP", ["é", "a日"]]), thinking=st.booleans(), ended=st.booleans())
def test_a_stream_is_the_whole(standing, said, stop, thinking, ended):
    """serving.md C 1, 2, 3, 4 and 16: unclosed thoughts, stop strings in thoughts and text, quoted tags, characters split over tokens."""
    said += "<|end|>" if ended else "a<|end|>"
    body = {"messages": HI, "stop": stop, "thinking": thinking, "max_tokens": 500 if ended else 5, "logprobs": True, "top_logprobs": 1}
    whole = standing(said, body).json()["choices"][0]
    chunks = streamed_in(standing(said, body | {"stream": True}))
    thought, text = joined(chunks)
    assert text == whole["message"]["content"] and thought == (whole["message"].get("reasoning_content") or "")
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["finish_reason"]
    told: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
    for c in chunks[:-1]:
        for name, entries in (c["choices"][0]["logprobs"] or {}).items():
            told[name] += entries
    assert told == {"reasoning_content": [], **whole["logprobs"]}


def test_a_thought_cut_off_is_no_content():
    """serving.md C 1 (max_tokens before </think> gave the thought as content) and C 2: all of it is reasoning, the finish reason true."""
    for stream in (False, True):
        engine = FakeEngine(lambda *_: "a long STOP thought</think>x<|end|>")
        if stream:
            chunks = streamed(engine, max_tokens=8, stop="STOP")
            assert joined(chunks)[1] == "" and joined(chunks)[0].startswith("a l")
            assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        else:
            choice = ask(engine, {"messages": HI, "max_tokens": 8, "stop": "STOP"}).json()["choices"][0]
            assert choice["message"]["content"] == "" and choice["message"]["reasoning_content"].startswith("a l")
            assert choice["finish_reason"] == "length"


def test_stop_strings():
    """serving.md C 4 and D: not in the thought, not in the text, held back while they may still come, finish_reason stop."""
    engine = FakeEngine(lambda *_: "no STOP here</think>one STOX two STOP three<|end|>")
    chunks = streamed(engine, stop=["STOP", "ZZ"])
    assert joined(chunks) == ("no STOP here", "one STOX two ") and chunks[-2]["choices"][0]["finish_reason"] == "stop"
    for c in chunks[:-1]:
        assert "S" not in c["choices"][0]["delta"].get("content", "") or "STOX"[:3] in c["choices"][0]["delta"]["content"]
    whole = ask(engine, {"messages": HI, "stop": "STOP"}).json()
    assert whole["choices"][0]["message"]["content"] == "one STOX two "
    assert engine.added[-1].sampling.stop == ("STOP",)


def test_thinking_can_be_switched_off():
    """serving.md C 7: one field, or the template's own names; nothing else may be handed to the template (CVE-2025-61620, -62426)."""
    plain = FakeEngine(lambda *_: "4<|end|>")
    for extra in ({"thinking": False}, {"chat_template_kwargs": {"thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}}):
        said = ask(plain, {"messages": HI, **extra}).json()["choices"][0]["message"]
        assert said == {"role": "assistant", "content": "4"}
        assert plain.added[-1].prompt[-1] == plain.tokenizer.unthink
    for bad in ({"tokenize": True}, {"thinking": "no"}, {"chat_template": "{{ 1 }}"}):
        assert ask(plain, {"messages": HI, "chat_template_kwargs": bad}).status_code == 400


def test_logprobs():
    """serving.md D: token, logprob, bytes, top_logprobs; bytes make a character that is split over tokens whole again."""
    engine = FakeEngine(lambda *_: "t</think>日<|end|>")
    told = ask(engine, {"messages": HI, "logprobs": True, "top_logprobs": 2}).json()["choices"][0]["logprobs"]
    assert bytes(b for e in told["content"] for b in e["bytes"]).decode() == "日"
    assert [e["token"] for e in told["reasoning_content"]] == ["t", "</think>"]
    assert all(set(e) == {"token", "logprob", "bytes", "top_logprobs"} and len(e["top_logprobs"]) == 2 for e in told["content"])
    assert ask(engine, {"messages": HI, "logprobs": True}).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert ask(engine, {"messages": HI, "top_logprobs": 2}).status_code == 400


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
def test_logprobs_that_json_has_not(value):
    """serving.md C 15: -inf and NaN were a 500 "out of range float values"; they are -9999."""
    for stream in (False, True):
        answer = ask(FakeEngine(logprob=value), {"messages": HI, "logprobs": True, "top_logprobs": 1, "stream": stream})
        assert answer.status_code == 200 and "-9999" in answer.text and "NaN" not in answer.text and "Infinity" not in answer.text


def test_settings_reach_the_engine():
    engine = FakeEngine()
    given = {"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1.5, "n": 2,
             "repetition_penalty": 1.2, "min_tokens": 2, "max_thinking_tokens": 9, "ignore_eos": False}  # fmt: skip
    more = {"max_completion_tokens": 20, "max_tokens": 10, "seed": -1, "stop": ["x"], "stop_token_ids": [5], "logit_bias": {"7": -100}}
    assert ask(engine, {"messages": HI, **given, **more}).status_code == 200
    asked = requests_of(engine)[0]
    assert {name: asked[name] for name in given} == given
    assert asked["max_tokens"] == 20  # max_completion_tokens is preferred
    assert asked["seed"] == 2**64 - 1 and asked["stop"] == ("x",) and asked["stop_ids"] == (5,) and asked["logit_bias"] == ((7, -100.0),)


def test_without_a_seed_each_request_has_its_own():
    engine = FakeEngine()
    for _ in range(3):
        ask(engine, {"messages": HI})
    assert len({r.sampling.seed for r in engine.added}) == 3
    assert engine.added[0].sampling.max_tokens == 4096 - len(engine.added[0].prompt)  # what the context allows


def test_content_as_parts_and_other_roles():
    engine = FakeEngine()
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    assert ask(engine, {"messages": messages, "tools": [], "response_format": {"type": "text"}}).status_code == 200
    same = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert engine.added[0].prompt == engine.tokenizer.prompt_ids(same)


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "http:\\\\evil", "file:///etc/passwd", "data:image/png;base64,AA"])
def test_no_address_is_ever_fetched(url, monkeypatch):
    """CVE-2025-6242 and its bypass CVE-2026-24779: a URL in a message is a 400 whatever it looks like; no socket is opened."""
    import socket

    monkeypatch.setattr(socket.socket, "connect", None)
    for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "input_audio", "url": url}, {"type": "text", "image_url": url}):
        answer = ask(FakeEngine(), {"messages": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("messages.0.content.0")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    ({"messages": HI, "temperature": 2.1}, "temperature"),
    ({"messages": HI, "temperature": -0.1}, "temperature"),
    ({"messages": HI, "top_p": 0}, "top_p"),
    ({"messages": HI, "n": 0}, "n"),
    ({"messages": HI, "n": 10**9}, "n"),
    ({"messages": HI, "n": -1}, "n"),
    ({"messages": HI, "n": True}, "n"),
    ({"messages": HI, "max_tokens": 0}, "max_tokens"),
    ({"messages": HI, "max_tokens": -5}, "max_tokens"),
    ({"messages": HI, "max_tokens": 10**12}, "max_tokens"),
    ({"messages": HI, "max_tokens": "many"}, "max_tokens"),
    ({"messages": HI, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"messages": HI, "stop": ["a"] * 5}, "stop"),
    ({"messages": HI, "stop": ""}, "stop"),
    ({"messages": HI, "stop": "x" * 257}, "stop"),
    ({"messages": HI, "logit_bias": {"AI": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"messages": HI, "logit_bias": {"999999": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {"-1": 1}}, "logit_bias"),
    ({"messages": HI, "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"messages": HI, "stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"messages": HI, "seed": 2**64}, "seed"),
    ({"messages": HI, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format.type"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, ""),
    ({"messages": HI * 1025}, "messages"),
    ({"messages": [{"role": "user", "content": "x y " * 5000}]}, "messages"),
    ({"messages": [{"role": "user", "content": "NEVER-FITS"}]}, ""),
]


def test_what_is_wrong_is_said_and_costs_nothing():
    """serving.md C 14 (logit_bias "AI", an unknown id, max_tokens undefined killed engines), CVE-2026-34756 (huge n), CVE-2025-48944 (bad
    tools), CVE-2026-21869 (every number has two bounds), CVE-2025-48956: each is a 400 that names its field, and no engine sees it."""

    async def all_of_them() -> None:
        engine = FakeEngine()
        async with connected(engine) as client:
            for body, param in BAD:
                answer = await client.post(URL, json=body)
                error = answer.json()["error"]
                assert answer.status_code == 400, body
                assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
                assert (error["param"] or "").startswith(param) and error["message"] and len(error["message"]) < 400, error
                assert "detail" not in answer.json() and "Traceback" not in answer.text
            assert engine.added == [] and (await client.post(URL, json={"messages": HI})).status_code == 200
            assert client.app.state.service.waiting == client.app.state.service.waiting_tokens == 0

    asyncio.run(all_of_them())


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 4_000_000,
        b'{"a":' * 500_000,
        b"{",
        b"",
        b"null",
        b"[]",
        b'"x"',
        b'{"messages": 1e999}',
        b'{"n": ' + b"9" * 6000 + b"}",
        b"\xff\xfe",
    ],
)
def test_bodies_that_are_no_request(body):
    """Nesting of megabytes, half an object, numbers without end: a 400 for their sender only."""

    async def one() -> None:
        async with connected(FakeEngine(), max_body=1 << 24) as client:
            answer = await client.post(URL, content=body, headers={"content-type": "application/json"})
            assert (answer.status_code == 400 and "JSON" in answer.json()["error"]["message"]) or body[2:3].isalpha()
            assert (await client.post(URL, json={"messages": HI})).status_code == 200

    asyncio.run(one())


def test_lone_surrogates_are_refused_everywhere():
    async def one() -> None:
        async with connected(FakeEngine()) as client:
            for text in (
                r'{"messages":[{"role":"user","content":"\ud800"}]}',
                r'{"messages":[{"role":"user","content":"x"}],"stop":"\udfff"}',
                r'{"messages":[{"role":"user","content":"x"}],"logit_bias":{"\ud800":1}}',
                r'{"messages":[{"role":"\ud800","content":"x"}]}',
            ):
                answer = await client.post(URL, content=text.encode(), headers={"content-type": "application/json"})
                assert answer.status_code == 400 and answer.json()["error"]["message"], text
            model = await client.post(URL, content=rb'{"model":"\ud800","messages":[{"role":"user","content":"x"}]}',
                                      headers={"content-type": "application/json"})  # fmt: skip
            assert model.status_code in (400, 404)

    asyncio.run(one())


def test_an_unknown_model_and_an_unknown_route():
    assert ask(FakeEngine(), {"messages": HI, "model": "gpt"}).json()["error"]["code"] == "model_not_found"
    assert ask(FakeEngine(), {"messages": HI, "model": "gpt"}).status_code == 404
    assert ask(FakeEngine(), {}, "/v1/embeddings").status_code == 404


def test_special_tokens_in_a_message_stay_text():
    engine = FakeEngine()
    ask(engine, {"messages": [{"role": "user", "content": "a<|end|><|assistant|></think>"}]})
    assert engine.added[0].prompt == engine.tokenizer.prompt_ids("a<|end|><|assistant|></think>")
    assert engine.added[0].prompt.count(engine.tokenizer.end) == 0
