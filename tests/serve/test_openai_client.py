"""OpenAI's own client and LiteLLM against the server, over HTTP: what they send is taken, what they read is what the engine said."""

import asyncio
import os
import re

import httpx
import openai
import pytest
import torch
from fake import FakeEngine
from live import Live, eventually, served
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tiny import talker, tiny_tokenizer

from pascaline.engine import Engine, Sampling
from pascaline.tokenizer import SPECIALS

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else its import looks for a list of prices on the net

ASK = [{"role": "user", "content": "the cat"}]
SEEDS = range(6)


@pytest.fixture(scope="module")
def model():
    return talker(tiny_tokenizer())


@pytest.fixture(scope="module")
def live(model):
    with served(Engine(model, tiny_tokenizer())) as running:
        yield running


@pytest.fixture
def client(live: Live):
    with connect(live) as made:
        yield made


def connect(live: Live, **options) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{live.url}/v1", "api_key": "nobody-asks", "max_retries": 0, "timeout": 30, **options})


def connect_async(live: Live, **options) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(**{"base_url": f"{live.url}/v1", "api_key": "nobody-asks", "max_retries": 0, "timeout": 30, **options})


def joined(chunks, index: int = 0) -> tuple[str, str, str | None]:
    """(thought, text, finish reason) of one choice of a stream, whose order is checked: role, thought, text, reason."""
    thought, text, reasons, roles = "", "", [], []
    for chunk in chunks:
        assert isinstance(chunk, ChatCompletionChunk) and chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            if choice.index != index:
                continue
            assert not reasons, "nothing follows the finish reason"
            new = getattr(choice.delta, "reasoning_content", None) or ""
            assert not (new and text), "the thought comes before the text"
            thought, text = thought + new, text + (choice.delta.content or "")
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert roles == ["assistant"] and len(reasons) == 1
    return thought, text, reasons[0]


def said(answer: ChatCompletion, index: int = 0) -> tuple[str, str, str]:
    choice = answer.choices[index]
    assert choice.index == index
    return getattr(choice.message, "reasoning_content", None) or "", choice.message.content, choice.finish_reason


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_models(client):
    (card,) = client.models.list().data
    assert card.id == "tiny" and card.object == "model" and client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat_is_the_engines_answer_whole_and_streamed(client, model):
    engine, closed = Engine(model, tiny_tokenizer()), 0
    for seed in SEEDS:
        how = dict(model="tiny", messages=ASK, temperature=1.0, top_p=0.9, max_tokens=50, seed=seed)
        answer = client.chat.completions.create(**how)
        ((expected,),) = engine.generate([ASK], Sampling(1.0, 0.9, max_tokens=50, seed=seed))
        assert said(answer) == (expected.reasoning, expected.text, expected.finish_reason)
        assert said(answer) == joined(client.chat.completions.create(**how, stream=True))
        assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
        assert answer.usage.completion_tokens == len(expected.token_ids)
        assert answer.usage.prompt_tokens == len(tiny_tokenizer().prompt_ids(ASK))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        closed += bool(expected.text)
    assert closed  # else this says nothing of texts


def test_the_async_client_gets_the_same(live):
    async def ask() -> tuple:
        async with connect_async(live) as client:
            how = dict(model="tiny", messages=ASK, temperature=1.0, max_tokens=50)
            wholes = await asyncio.gather(*(client.chat.completions.create(**how, seed=s) for s in SEEDS))
            streams = [[c async for c in await client.chat.completions.create(**how, seed=s, stream=True)] for s in SEEDS]
        return wholes, streams

    wholes, streams = asyncio.run(ask())
    assert [said(answer) for answer in wholes] == [joined(chunks) for chunks in streams]
    with connect(live) as client:
        again = [client.chat.completions.create(model="tiny", messages=ASK, temperature=1.0, max_tokens=50, seed=s) for s in SEEDS]
    assert [said(a) for a in again] == [said(a) for a in wholes]


def test_n(client):
    how = dict(model="tiny", messages=ASK, temperature=1.2, max_tokens=20, seed=3, n=4)
    answer = client.chat.completions.create(**how)
    assert len({said(answer, i) for i in range(4)}) == 4
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert [joined(chunks, i) for i in range(4)] == [said(answer, i) for i in range(4)]
    order = [c.choices[0].index for c in chunks if c.choices]
    assert order != sorted(order)  # side by side, not one after the other
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_seeds(client):
    how = dict(model="tiny", messages=ASK, temperature=1.0, max_tokens=20)
    assert len({said(client.chat.completions.create(**how, seed=5)) for _ in range(3)}) == 1
    assert len({said(client.chat.completions.create(**how, seed=s)) for s in SEEDS}) > 3
    assert len({said(client.chat.completions.create(**how)) for _ in SEEDS}) > 3  # without a seed each is another
    fingerprints = {client.chat.completions.create(**how, seed=s).system_fingerprint for s in SEEDS}
    assert len(fingerprints) == 1 and None not in fingerprints


def test_limits_of_length(client):
    for limit in (dict(max_tokens=3), dict(max_completion_tokens=3), dict(max_tokens=9, max_completion_tokens=3)):
        answer = client.chat.completions.create(model="tiny", messages=ASK, seed=2, temperature=0, **limit)
        assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def test_logit_bias_and_stop(client):
    tokenizer = tiny_tokenizer()
    a = tokenizer.encode("a")[0]
    how = dict(model="tiny", max_tokens=8, logit_bias={str(a): 100}, extra_body={"thinking": False})
    answer = client.chat.completions.create(messages=ASK, **how)
    assert said(answer) == ("", "a" * 8, "length")
    for stop, left in (("aaa", ""), (["x", "aaaa"], ""), (["b"], "a" * 8)):
        answer = client.chat.completions.create(messages=ASK, stop=stop, **how)
        assert answer.choices[0].message.content == left and answer.choices[0].finish_reason == ("length" if left else "stop")
        assert said(answer) == joined(client.chat.completions.create(messages=ASK, stop=stop, stream=True, **how))


def test_stop_strings_do_not_fire_inside_the_thought(client):
    """vLLM #14399, #14170."""
    a = tiny_tokenizer().encode("a")[0]
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=8, logit_bias={str(a): 100}, stop=["aa"])
    assert said(answer) == ("a" * 8, "", "length")  # and an unclosed thought is no content (vLLM #35221)


def spelt(entries) -> str:
    """The text of logprobs; special tokens are listed there, but are no text."""
    return b"".join(bytes(e.bytes) for e in entries if e.token not in SPECIALS).decode("utf-8", "replace")


def test_logprobs_are_the_models(client, model):
    tokenizer, checked = tiny_tokenizer(), 0
    prompt = tokenizer.prompt_ids(ASK, thinking=False)
    for seed in SEEDS:
        how = dict(model="tiny", messages=ASK, temperature=0.7, max_tokens=30, seed=seed, logprobs=True, top_logprobs=4)
        answer = client.chat.completions.create(**how, extra_body={"thinking": False})
        ((expected,),) = Engine(model, tokenizer).generate([prompt], Sampling(0.7, max_tokens=30, seed=seed, top_logprobs=4))
        entries = answer.choices[0].logprobs.content
        ids = expected.token_ids[:-1] if expected.finish_reason == "stop" else expected.token_ids
        assert spelt(entries) == answer.choices[0].message.content
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert [e.logprob for e in entries] == pytest.approx(log_p.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(), abs=1e-4)
        for entry, row in zip(entries, log_p, strict=True):
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
        chunks = client.chat.completions.create(**how, extra_body={"thinking": False}, stream=True)
        streamed = [e for c in chunks for choice in c.choices if choice.logprobs for e in choice.logprobs.content or []]
        assert streamed == entries
        checked += len(entries)
    assert checked > 50


def test_a_thoughts_logprobs_are_told_apart(client):
    for seed in SEEDS:
        answer = client.chat.completions.create(model="tiny", messages=ASK, temperature=1.0, max_tokens=40, seed=seed, logprobs=True)
        found = answer.choices[0].logprobs
        thought = (found.model_extra or {}).get("reasoning_content") or []
        assert spelt(found.content) == answer.choices[0].message.content
        assert len(thought) >= answer.usage.completion_tokens_details.reasoning_tokens - 1


def test_usage_of_streams(client):
    how = dict(model="tiny", messages=ASK, seed=1, max_tokens=12, stream=True)
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**how))
    *chunks, last = client.chat.completions.create(**how, stream_options={"include_usage": True})
    assert last.choices == [] and all(chunk.usage is None and chunk.choices for chunk in chunks)
    whole = client.chat.completions.create(**{**how, "stream": False})
    assert last.usage.completion_tokens == whole.usage.completion_tokens and last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens_details.reasoning_tokens <= last.usage.completion_tokens
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in [*chunks, last]}) == 1


def test_cached_tokens_are_told(client):
    long = [{"role": "user", "content": "the mat " * 40}]
    first, second = (client.chat.completions.create(model="tiny", messages=long, max_tokens=2, seed=s) for s in (1, 2))
    assert second.usage.prompt_tokens - 32 <= second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert first.usage.prompt_tokens == second.usage.prompt_tokens


def test_what_clients_send_besides_is_ignored(client):
    """vLLM PR #1045: an empty logit_bias; and fields that a server of one's own has no use for."""
    extra = dict(user="me", store=False, metadata={"a": "b"}, parallel_tool_calls=False, service_tier="auto", logit_bias={})
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]}]
    how = dict(model="tiny", seed=4, max_tokens=9)
    whole = client.chat.completions.create(messages=parts, **how, **extra)
    assert said(whole) == said(client.chat.completions.create(messages=ASK, **how))


# ---- completions -----------------------------------------------------------------------------------------------------


def test_completions(client, model):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.prefix + tokenizer.encode("the cat")
    how = dict(model="tiny", temperature=0.8, max_tokens=15, seed=6)
    answer = client.completions.create(prompt="the cat", **how)
    ((expected,),) = Engine(model, tokenizer).generate([ids], Sampling(0.8, max_tokens=15, seed=6))
    assert isinstance(answer, Completion) and answer.object == "text_completion"
    said_ids = expected.token_ids[:-1] if expected.finish_reason == "stop" else expected.token_ids
    assert answer.choices[0].text == tokenizer.decode(said_ids, special=True)
    assert answer.choices[0].text == "".join(c.choices[0].text for c in client.completions.create(prompt="the cat", **how, stream=True))
    assert answer.choices[0].text == client.completions.create(prompt=ids, **how).choices[0].text
    both = client.completions.create(prompt=["the cat", "the mat"], n=2, **how)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3] and both.choices[0].text == answer.choices[0].text


def test_echo_gives_the_prompts_logprobs(client, model):
    tokenizer = tiny_tokenizer()
    ids = tokenizer.prefix + tokenizer.encode("the cat sat")
    answer = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=2, max_tokens=0)
    found = answer.choices[0].logprobs
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    expected = log_p[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert found.token_logprobs[0] is None and found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert len(found.tokens) == len(ids) == len(found.text_offset) == len(found.top_logprobs)
    assert answer.choices[0].text == "".join(found.tokens)
    assert answer.usage.completion_tokens == 0


# ---- going away ------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow():
    """An engine whose step takes a while, and what is said to FOREVER has no end."""
    engine = FakeEngine(
        lambda prompt, _: "on and " * 50 if "FOREVER" in prompt else "yes</think>ok<|end|>", tokenizer=tiny_tokenizer(), delay=0.05
    )
    with served(engine, max_tokens=4000) as running:
        yield running


FOREVER = dict(model="tiny", messages=[{"role": "user", "content": "FOREVER"}], max_tokens=4000)


def test_a_closed_stream_frees_the_engine_within_a_step(slow):
    with connect(slow) as client:
        for _ in range(3):
            stream = client.chat.completions.create(**FOREVER, stream=True)
            for _ in range(4):
                next(stream)
            before = slow.engine.stats.steps
            stream.close()
            assert eventually(lambda: slow.engine.empty)
            assert slow.engine.stats.steps - before <= 3  # the one that runs, one that may begin before the news arrives, and a late loop
    assert slow.engine.cancelled == 3 and slow.idle()


def test_a_client_that_times_out_frees_the_engine(slow):
    """llama.cpp #25055, Starlette cancels only streams (ROCm/ATOM #1562)."""
    with connect(slow, timeout=0.4) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(**FOREVER)
    assert eventually(lambda: slow.engine.cancelled == 1) and slow.idle()


def test_a_cancelled_task_frees_the_engine(slow):
    async def ask() -> None:
        async with connect_async(slow) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    await client.chat.completions.create(**FOREVER)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4):
                    async for _ in await client.chat.completions.create(**FOREVER, stream=True):
                        pass

    asyncio.run(ask())
    assert eventually(lambda: slow.engine.cancelled == 2) and slow.idle()


def test_many_that_leave_a_real_engine_leave_no_block(live):
    async def ask() -> None:
        async with connect_async(live) as client:

            async def leave(i: int) -> None:
                how = dict(model="tiny", messages=[{"role": "user", "content": "the mat " * (i % 9)}], max_tokens=400, seed=i)
                stream = await client.chat.completions.create(**how, n=1 + i % 3, stream=True, extra_body={"ignore_eos": True})
                for _ in range(i % 5):
                    await anext(stream)
                await stream.close()

            await asyncio.gather(*(leave(i) for i in range(60)))

    asyncio.run(ask())
    assert live.idle() and live.engine.scheduler.queued == 0


def test_an_idle_servers_metrics_do_not_count_those_that_left(live):
    """The last one leaves and no step follows: nothing runs, waits or holds a block."""
    with connect(live) as client:
        stream = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=400, stream=True, extra_body={"ignore_eos": True})
        for _ in range(5):
            next(stream)
        stream.close()
    assert live.idle()
    told = httpx.get(f"{live.url}/metrics").text
    found = re.findall(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$", told, re.M)
    assert len(found) == 3 and all(float(value) == 0 for _, value in found), found


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [dict(temperature=3), dict(n=0), dict(top_logprobs=2), dict(messages=[]), dict(max_tokens=-1), dict(logit_bias={"AI": 1})]
)
def test_a_bad_request_is_told_what_is_wrong(client, wrong):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": ASK, **wrong})
    (name,) = wrong
    assert caught.value.status_code == 400 and caught.value.type == "invalid_request_error"
    assert name in str(caught.value.body["message"]) and caught.value.param and name in caught.value.param


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert caught.value.code == "model_not_found"


def test_keys(tmp_path):
    (tmp_path / "keys").write_text("first-key-123\nsecond-key-456\n")
    with served(FakeEngine(tokenizer=tiny_tokenizer()), api_key_file=tmp_path / "keys") as running:
        for wrong in ("nobody-asks", "first-key-12", "first-key-1234", "é" * 3):
            with connect(running, api_key=wrong) as client, pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                client.models.list()
        for right in ("first-key-123", "second-key-456"):
            with connect(running, api_key=right) as client:
                assert client.chat.completions.create(model="tiny", messages=ASK).choices[0].finish_reason == "stop"


def test_a_full_queue_is_a_rate_limit_with_a_time_to_come_back():
    """vLLM #18826: a queue without a bound; Retry-After is what the client's own retries wait for."""
    engine = FakeEngine(
        lambda prompt, _: "on and " * 50 if "FOREVER" in prompt else "ok<|end|>", tokenizer=tiny_tokenizer(), rows=1, delay=0.01
    )
    with served(engine, max_queue=1) as running, connect(running) as client:
        first = client.chat.completions.create(**FOREVER, stream=True)
        next(first)
        assert eventually(lambda: running.service.waiting == 0)
        second = client.chat.completions.create(**FOREVER, stream=True)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=ASK)
        assert 0 < float(caught.value.response.headers["retry-after"]) <= 120
        first.close()
        second.close()
        assert client.with_options(max_retries=4).chat.completions.create(model="tiny", messages=ASK).choices[0].finish_reason == "stop"


def test_a_failure_in_mid_stream_is_an_error_of_the_stream():
    engine = FakeEngine(tokenizer=tiny_tokenizer())
    with served(engine) as running, connect(running) as client:
        for word in ("NAN", "POISON"):
            ask = dict(model="tiny", messages=[{"role": "user", "content": word}])
            with pytest.raises(openai.APIError) as caught:
                list(client.chat.completions.create(**ask, stream=True))
            assert not isinstance(caught.value, openai.APIStatusError) and "0x7fff" not in str(caught.value)
            with pytest.raises(openai.InternalServerError) as failed:
                client.chat.completions.create(**ask)
            assert failed.value.status_code == 500 and "0x7fff" not in str(failed.value)
        assert client.chat.completions.create(model="tiny", messages=ASK).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("text", ["안녕하세요, 세계", "日本語の答え", "naïve 👩‍👩‍👧 ok", "a</think>b <think> c", "\ufffd really"])
def test_characters_that_span_tokens_arrive_whole(text):
    """dynamo #12630: Hangul lost by the streaming path alone; vLLM PR #53924: a quoted tag dropped when streamed."""
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer.encode("제 생각"), tokenizer.unthink, *tokenizer.encode(text), tokenizer.end]
    with served(FakeEngine(lambda *_: ids, tokenizer=tokenizer)) as running, connect(running) as client:
        how = dict(model="tiny", messages=ASK, max_tokens=500)
        assert said(client.chat.completions.create(**how)) == ("제 생각", text, "stop")
        assert joined(client.chat.completions.create(**how, stream=True)) == ("제 생각", text, "stop")


# ---- LiteLLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm():
    import litellm

    litellm.telemetry = False
    return litellm


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm(litellm, live, client, provider):
    how = dict(messages=ASK, temperature=1.0, max_tokens=50)
    to = dict(model=f"{provider}/tiny", api_base=f"{live.url}/v1", api_key="nobody-asks", num_retries=0)
    texts = 0
    for seed in SEEDS:
        expected = said(client.chat.completions.create(model="tiny", seed=seed, **how))
        answer = litellm.completion(**to, **how, seed=seed)
        message = answer.choices[0].message
        assert (getattr(message, "reasoning_content", None) or "", message.content, answer.choices[0].finish_reason) == expected
        thought = text = ""
        for chunk in litellm.completion(**to, **how, seed=seed, stream=True):
            thought += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            text += chunk.choices[0].delta.content or ""
        assert (thought, text) == expected[:2]
        texts += bool(text)
    assert texts
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**to, messages=ASK, temperature=3.0)
    assert litellm.text_completion(**to, prompt="the cat", max_tokens=5, seed=1).usage.completion_tokens <= 5
