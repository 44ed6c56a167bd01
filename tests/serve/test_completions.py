"""Raw completions, as lm-eval's local-completions and older clients want them; tokenize."""

import asyncio
import json

import pytest
from fake import FakeEngine, connected, requests_of
from test_chat_completions import ask, events

URL = "/v1/completions"


def test_a_whole_completion_field_by_field():
    said = ask(FakeEngine(lambda *_: "12<|end|>"), {"model": "model", "prompt": "6+6=", "max_tokens": 9}, URL).json()
    assert said["object"] == "text_completion" and said["id"].startswith("cmpl-")
    assert said["choices"] == [{"index": 0, "text": "12", "logprobs": None, "finish_reason": "stop"}]
    own = FakeEngine().tokenizer
    assert said["usage"]["prompt_tokens"] == 1 + len(own.encode("6+6=")) and said["usage"]["completion_tokens"] == 3


def test_all_is_text_and_tags_are_written_out():
    engine = FakeEngine(lambda *_: "<think>a STOP</think>b<|end|>")
    assert ask(engine, {"prompt": "x"}, URL).json()["choices"][0]["text"] == "<think>a STOP</think>b"
    engine = FakeEngine(lambda *_: "<think>a STOP" + "b" * 200, delay=0.002)
    cut = ask(engine, {"prompt": "x", "stop": "STOP", "max_tokens": 200}, URL).json()  # the engine does not stop in a thought
    assert cut["choices"][0]["text"] == "<think>a " and cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] == 1 + len(engine.tokenizer.encode("a STOP")) and engine.cancelled == 1


@pytest.mark.parametrize("prompt", ["a b", ["a b", "c"], [5, 9, 11], [[5, 9], [11]]])
def test_four_kinds_of_prompt(prompt):
    engine = FakeEngine(lambda text, i: f"{i}{text[-1]}<|end|>")
    said = ask(engine, {"prompt": prompt, "n": 2}, URL).json()
    several = isinstance(prompt[0], str | list) and not isinstance(prompt, str)
    count = len(prompt) if several else 1
    assert [c["index"] for c in said["choices"]] == list(range(2 * count))
    assert [c["text"][0] for c in said["choices"]] == ["0", "1"] * count
    own = engine.tokenizer
    expected = [own.prefix + own.encode(p) if isinstance(p, str) else p for p in (prompt if several else [prompt])]
    assert [r.prompt for r in engine.added[::2]] == expected
    assert said["usage"]["prompt_tokens"] == sum(map(len, expected))
    seeds = [r["seed"] for r in requests_of(engine)[::2]]
    assert len(set(seeds)) == count


def test_a_written_begin_token_is_not_doubled_and_special_tokens_are_parsed():
    engine = FakeEngine(lambda *_: "x<|end|>")
    ask(engine, {"prompt": "<|begin|>a<|user|>"}, URL)
    own = engine.tokenizer
    assert engine.added[0].prompt == [own.begin, *own.encode("a"), own.user]


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(most, stream):
    """What lm-eval's loglikelihood reads: the prompt's tokens with theirs, first None; with max_tokens 1 exactly one more entry."""
    engine = FakeEngine(lambda *_: "<|end|>")
    ids = [0, *engine.tokenizer.encode("ab 日")]
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0, "stream": stream}
    answer = ask(engine, body, URL)
    if stream:
        chunks = events(answer.text)
        assert chunks.pop() == "[DONE]"
        told = {k: [x for c in chunks for x in c["choices"][0]["logprobs"][k]] for k in chunks[0]["choices"][0]["logprobs"]}
        text = "".join(c["choices"][0]["text"] for c in chunks)
    else:
        told, text = answer.json()["choices"][0]["logprobs"], answer.json()["choices"][0]["text"]
    assert text == "<|begin|>ab 日"
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(told["text_offset"]) == len(ids) + most
    assert told["token_logprobs"] == [None, *[-1.0] * (len(ids) - 1), *[-0.5] * most] and told["top_logprobs"][0] is None
    assert all(p == max(top.values()) for p, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True))
    assert told["text_offset"][:3] == [0, 9, 10] and told["text_offset"] == sorted(told["text_offset"])
    whole = b"".join(bytes.fromhex(t[6:].replace("\\x", "")) if t.startswith("bytes:") else t.encode() for t in told["tokens"])
    assert whole.decode() == "<|begin|>ab 日" + "<|end|>" * most


def test_a_stream_of_several_prompts():
    engine = FakeEngine(lambda text, i: f"{text[-1]}{i}日<|end|>")
    answer = ask(engine, {"prompt": ["a", "b"], "n": 2, "stream": True, "echo": True, "stream_options": {"include_usage": True}}, URL)
    chunks = events(answer.text)
    assert chunks.pop() == "[DONE]" and chunks.pop()["usage"]["completion_tokens"] == 4 * (2 + len(engine.tokenizer.encode("日")) + 1)
    texts: dict[int, str] = {}
    ends = []
    for c in chunks:
        (choice,) = c["choices"]
        assert c["object"] == "text_completion" and c["usage"] is None
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        ends += [choice["index"]] * (choice["finish_reason"] is not None)
    assert texts == {0: "aa0日", 1: "aa1日", 2: "bb0日", 3: "bb1日"} and sorted(ends) == [0, 1, 2, 3]


def test_what_cannot_be():
    """An empty prompt crashed an engine once (serving.md C, size)."""
    engine = FakeEngine()

    async def all_of_them():
        async with connected(engine) as client:
            for body in (
                {"prompt": []}, {"prompt": [[]]}, {"prompt": [10**6]}, {"prompt": [-1]}, {"prompt": [[5], ["a"]]}, {"prompt": None}, {},
                {"prompt": ["a"] * 257}, {"prompt": "a", "max_tokens": 0}, {"prompt": "a", "logprobs": 21}, {"prompt": "a", "suffix": "b"},
                {"prompt": "a", "best_of": 3}, {"prompt": [5] * 4097, "echo": True, "max_tokens": 0}, {"prompt": [5] * 4096},
                {"prompt": [True, False]}, {"prompt": {"a": 1}}, {"prompt": "a", "prompt_embeds": "AAAA", "n": 0},
            ):  # fmt: skip
                answer = await client.post(URL, json=body)
                assert answer.status_code == 400 and answer.json()["error"]["message"], body
            assert not engine.added
            assert (await client.post(URL, json={"prompt": [5] * 4096, "echo": True, "max_tokens": 0})).status_code == 200
            assert (await client.post(URL, json={"prompt": "a", "best_of": 2, "n": 2, "suffix": None})).status_code == 200

    asyncio.run(all_of_them())


def test_one_bad_prompt_of_several_leaves_nothing_behind():
    engine = FakeEngine()
    assert ask(engine, {"prompt": ["good", "NEVER-FITS", "good"]}, URL).status_code == 400


def test_tokenize():
    engine = FakeEngine()
    own = engine.tokenizer
    assert ask(engine, {"prompt": "abc"}, "/tokenize").json() == {
        "count": len(own.encode("abc")) + 1, "tokens": [own.begin, *own.encode("abc")], "max_model_len": 4096,
    }  # fmt: skip
    assert ask(engine, {"prompt": "abc", "add_special_tokens": False}, "/tokenize").json()["tokens"] == own.encode("abc")
    chat = ask(engine, {"messages": [{"role": "user", "content": "hi"}]}, "/tokenize").json()
    assert chat["tokens"] == own.prompt_ids("hi") and json.dumps(chat)
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]}, {"prompt": 5}):
        assert ask(engine, body, "/tokenize").status_code == 400
    assert ask(engine, {"prompt": ""}, "/tokenize").json()["count"] == 1
