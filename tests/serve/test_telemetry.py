"""The metrics: vLLM's names, the engine's numbers, and what a million tokens cost."""

import asyncio
import time

import pytest
from fake import FakeEngine, connected
from prometheus_client.parser import text_string_to_metric_families
from test_chat_completions import HI, URL

from pascaline.serve import telemetry
from pascaline.serve.telemetry import Cost

NAMES = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits", "prompt_tokens",
    "generation_tokens", "request_success", "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "num_preemptions", "request_prompt_tokens",
    "request_generation_tokens",
]  # fmt: skip


def read(text: str) -> dict[str, list]:
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def value(samples, **labels) -> float:
    """The sample with these labels; of a counter or gauge there is one."""
    found = [s for s in samples if all(s.labels.get(k) == v for k, v in labels.items()) and not s.name.endswith(("_bucket", "_created"))]
    return found[0].value


def test_the_names_are_vllms():
    """serving.md A, the metric names worth mirroring; each has the label model_name, and counters end in _total."""

    async def one():
        async with connected(FakeEngine(), name="tiny") as client:
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            return answer.text

    text = asyncio.run(one())
    families = read(text)
    for name in NAMES:
        samples = families[f"vllm:{name}"]
        assert samples and all(s.labels["model_name"] == "tiny" for s in samples), name
    for name in ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"):
        assert f'vllm:{name}_total{{model_name="tiny"}} 0.0' in text
    assert not any("price" in name for name in families)
    assert {s.labels["finished_reason"] for s in families["vllm:request_success"]} == {"stop", "length", "abort", "error"}


def test_the_numbers_are_those_of_the_requests():
    engine = FakeEngine(lambda *_: "abcdefgh</think>x<|end|>")
    engine.stats.prefix_queries, engine.stats.prefix_hits, engine.stats.accepted_tokens, engine.stats.blocks_used = 70, 30, 7, 500

    async def one():
        async with connected(engine) as client:
            await client.post(URL, json={"messages": HI, "n": 2})
            await client.post(URL, json={"messages": HI, "max_tokens": 3})
            await client.post(URL, json={"messages": [{"role": "user", "content": "NAN"}]})
            service = client.app.state.service
            service.telemetry.finished(engine.added[0], "abort")
            return read((await client.get("/metrics")).text), len(engine.added[0].prompt)

    families, prompt = asyncio.run(one())
    assert value(families["vllm:request_success"], finished_reason="stop") == 2
    assert value(families["vllm:request_success"], finished_reason="length") == 1
    assert value(families["vllm:request_success"], finished_reason="error") == 1
    assert value(families["vllm:request_success"], finished_reason="abort") == 1
    assert value(families["vllm:generation_tokens"]) == 2 * len(engine.added[0].script) + 3
    assert value(families["vllm:prompt_tokens"]) == 3 * prompt  # a prompt once, however many answers it has
    assert value(families["vllm:prefix_cache_queries"]) == 70 and value(families["vllm:prefix_cache_hits"]) == 30
    assert value(families["vllm:spec_decode_num_accepted_tokens"]) == 7
    counts = {name: next(s.value for s in families[f"vllm:{name}"] if s.name.endswith("_count")) for name in NAMES if "_seconds" in name}
    assert (
        counts["time_to_first_token_seconds"] == counts["request_prefill_time_seconds"] == 4 and counts["e2e_request_latency_seconds"] == 5
    )


def test_prices(monkeypatch):
    """A step's seconds are shared by the tokens it computed: 3600 an hour is 1 a second."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    cost = Cost(3600.0)
    for _ in range(10):
        now[0] += 2.0
        cost.add(1.0, 75, 25)
        cost.input_tokens += 150  # half of them came from the cache
    priced = cost.per_million()
    assert priced["input"] == pytest.approx(7.5 / 1500 * 1e6) and priced["output"] == pytest.approx(2.5 / 250 * 1e6)
    assert cost.busy() == pytest.approx(0.5) and cost.spent() == pytest.approx(20.0)
    for _ in range(200):  # the window moves on: what was is forgotten
        now[0] += 5.0
        cost.add(1.0, 0, 100)
    assert cost.per_million() == {"input": 0.0, "output": pytest.approx(1.0 / 100 * 1e6)}
    assert len(cost._marks) < 100 and cost.busy() == pytest.approx(0.2)


def test_prices_are_shown_if_there_is_one():
    async def one():
        async with connected(FakeEngine(), price_per_hour=2.0) as client:
            await client.post(URL, json={"messages": HI})
            return read((await client.get("/metrics")).text)

    families = asyncio.run(one())
    for kind in ("input", "output"):
        assert value(families["pascaline:price_per_million_tokens"], kind=kind) > 0
    assert value(families["pascaline:cost"]) > 0 and 0 <= value(families["pascaline:busy_ratio"]) <= 1
    assert telemetry.WINDOW == 300
