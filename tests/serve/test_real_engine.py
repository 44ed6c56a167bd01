"""The server on a real engine with a tiny random model: the engine's own answers, the model's own log-probabilities, blocks given back."""

import asyncio

import pytest
import torch
from fake import connected
from test_chat_completions import HI, URL, events, joined
from test_service import Browser
from tiny import tiny_model

from pascaline.engine import Engine, Sampling
from pascaline.tokenizer import train

MESSAGES = [{"role": "system", "content": "abc " * 30}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def parts():
    own = train(["Make 12 from 6, 6. The answer is 12. abc"] * 3, 290)
    model = tiny_model(vocab_size=own.vocab_size, max_position_embeddings=512, eos_token_id=own.end)
    with torch.no_grad():
        model.head_weight.mul_(0.5)
    return model, own


def test_the_answer_is_the_engines_whole_streamed_and_several(parts):
    model, own = parts
    ids = own.prompt_ids(MESSAGES)
    (expected,) = Engine(model, own).generate([ids], Sampling(1.0, 1.0, max_tokens=60, n=3, seed=7))
    body = {"messages": MESSAGES, "temperature": 1, "top_p": 1, "max_tokens": 60, "n": 3, "seed": 7, "logprobs": True, "top_logprobs": 3}

    async def one():
        async with connected(Engine(model, own)) as client:
            whole = (await client.post(URL, json=body)).json()
            again = (await client.post(URL, json=body)).json()
            chunks = events((await client.post(URL, json={**body, "stream": True})).text)
            return whole, again, chunks

    whole, again, chunks = asyncio.run(one())
    for i, output in enumerate(expected):
        choice = whole["choices"][i]
        assert choice["message"] == {"role": "assistant", "content": output.text, "reasoning_content": output.reasoning}
        assert choice["finish_reason"] == output.finish_reason and joined(chunks, i) == (output.reasoning, output.text)
        told = choice["logprobs"].get("reasoning_content", []) + choice["logprobs"]["content"]
        kept = [p for t, p in zip(output.token_ids, output.logprobs, strict=True) if t != own.end]
        assert [e["logprob"] for e in told] == pytest.approx(kept, abs=1e-5) and all(len(e["top_logprobs"]) == 3 for e in told)
    assert [c["message"] for c in again["choices"]] == [c["message"] for c in whole["choices"]]
    assert whole["usage"]["completion_tokens"] == sum(len(o.token_ids) for o in expected)
    assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached < len(ids) and cached > len(ids) - 32  # all but the last block


def test_echoed_logprobs_are_the_models(parts):
    """What lm-eval sums: of the prompt's own tokens, with or without a token after them."""
    model, own = parts
    ids = own.encode("The answer is 12. abc")
    with torch.no_grad():
        logp = model(torch.tensor([ids])).float().log_softmax(-1)[0]
    exact = [float(logp[i, t]) for i, t in enumerate(ids[1:])]

    async def one():
        async with connected(Engine(model, own)) as client:
            return [
                (await client.post("/v1/completions", json={"prompt": [ids, ids[:4]], "echo": True, "logprobs": 1, "max_tokens": n})).json()
                for n in (0, 1)
            ]

    for count, said in enumerate(asyncio.run(one())):
        first, second = (choice["logprobs"] for choice in said["choices"])
        assert first["token_logprobs"][0] is None and first["token_logprobs"][1 : len(ids)] == pytest.approx(exact, abs=1e-4)
        assert second["token_logprobs"][1:4] == pytest.approx(exact[:3], abs=1e-4)
        assert len(first["tokens"]) == len(ids) + count
        for i in range(1, len(ids)):
            best = max(first["top_logprobs"][i].values())
            assert best >= first["token_logprobs"][i] - 1e-6
            assert (best == first["token_logprobs"][i]) == (int(logp[i - 1].argmax()) == ids[i])


def test_settings_that_a_random_model_obeys(parts):
    model, own = parts
    letter = own.encode("z")[0]

    async def one():
        async with connected(Engine(model, own)) as client:

            async def ask(**body):
                answer = await client.post(URL, json={"messages": HI, "max_tokens": 30, "seed": 1, **body})
                assert answer.status_code == 200, answer.text
                return answer.json()

            biased = await ask(logit_bias={str(letter): 100}, max_tokens=5)
            assert biased["choices"][0]["message"]["reasoning_content"] == "zzzzz"
            closed = await ask(max_thinking_tokens=3, max_tokens=20, ignore_eos=True)
            assert closed["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 4
            assert closed["choices"][0]["message"]["content"]
            plain = await ask(thinking=False)
            assert "reasoning_content" not in plain["choices"][0]["message"]
            assert plain["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
            text = (await ask(thinking=False, ignore_eos=True))["choices"][0]["message"]["content"]
            stop = text[3:5]
            cut = await ask(thinking=False, ignore_eos=True, stop=[stop])
            assert cut["choices"][0]["message"]["content"] == text[: text.index(stop)] and cut["choices"][0]["finish_reason"] == "stop"
            refused = await client.post(URL, json={"messages": [{"role": "user", "content": "y " * 600}]})
            assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"

    asyncio.run(one())


def test_who_goes_away_gives_the_blocks_back(parts):
    """serving.md C 12, on the real cache."""
    model, own = parts
    engine = Engine(model, own, max_rows=8)

    async def one():
        async with connected(engine) as client:
            for round_ in range(6):
                body = {"messages": MESSAGES, "max_tokens": 300, "ignore_eos": True, "n": 2}
                visits = [Browser(client.app, {**body, "stream": i % 2 == 0}) for i in range(8)]
                tasks = [asyncio.create_task(v.visit()) for v in visits]
                while not engine.stats.running:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.01 * round_)
                for v in visits:
                    v.gone.set()
                await asyncio.gather(*tasks)
                while client.app.state.service._live:
                    await asyncio.sleep(0.001)
            assert not engine.busy
            answer = await client.post(URL, json={"messages": HI, "max_tokens": 3})
            assert answer.status_code == 200 and engine.stats.blocks_used == engine.stats.running == engine.stats.waiting == 0
            text = (await client.get("/metrics")).text
            assert 'vllm:kv_cache_usage_perc{model_name="model"} 0.0' in text

    asyncio.run(one())


def test_a_poisoned_weight_fails_its_request_and_no_other(parts):
    """An embedding that is not finite makes that token's request an error; the others and the next ones are well."""
    _, own = parts
    model = tiny_model(vocab_size=own.vocab_size, max_position_embeddings=512, eos_token_id=own.end)
    bad = own.encode("Q")[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan

    async def one():
        async with connected(Engine(model, own)) as client:
            body = {"max_tokens": 30, "logit_bias": {str(bad): -100}, "ignore_eos": True, "temperature": 0}
            good = [client.post(URL, json={"messages": HI, **body}) for _ in range(3)]
            poisoned = client.post(URL, json={"messages": [{"role": "user", "content": "QQ"}], **body})
            *others, failed = await asyncio.gather(*good, poisoned)
            assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
            assert [o.status_code for o in others] == [200] * 3
            assert (await client.post(URL, json={"messages": HI, **body})).status_code == 200

    asyncio.run(one())
