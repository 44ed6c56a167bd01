"""Metrics under vLLM's names, so that its dashboards work, and what a million tokens cost now.

Counters and gauges are the engine's own statistics, read when somebody asks; histograms are fed when an answer ends.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

WINDOW = 300.0  # seconds over which a token's price is taken
REASONS = ("stop", "length", "abort", "error")
TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
TPOT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
LATENCY = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
# Counters of engine.stats: name, its attribute, and what it is.
STATS = (
    ("vllm:prompt_tokens", None, "Prompt tokens of the requests whose first token has come, the cached ones too."),
    ("vllm:generation_tokens", "generated", "Tokens generated."),
    ("vllm:prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache."),
    ("vllm:prefix_cache_hits", "prefix_hits", "Prompt tokens found there."),
    ("vllm:num_preemptions", "preemptions", "Answers that lost their cache blocks and were computed again."),
    ("vllm:spec_decode_num_drafts", "drafts", "Drafts verified."),
    ("vllm:spec_decode_num_draft_tokens", "draft_tokens", "Tokens drafted."),
    ("vllm:spec_decode_num_accepted_tokens", "accepted_tokens", "Drafted tokens accepted."),
    ("pascaline:prefill_tokens", "prefilled", "Prompt tokens computed."),
    ("pascaline:steps", "steps", "Forward passes of the engine."),
)


class Telemetry:
    """The engine's thread calls stepped and finished, the event loop the rest; `stats` gives the engine's, None while it loads."""

    def __init__(self, model: str, price_per_hour: float, stats: Callable[[], Any]):
        self.model, self.stats = model, stats
        self.registry = CollectorRegistry(auto_describe=False)
        self.cost = Cost(price_per_hour)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry).labels(model)

        self.ttft = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT)
        self.inter_token = histogram("vllm:inter_token_latency_seconds", "Mean time between two tokens of an answer.", TPOT)
        self.per_token = histogram("vllm:request_time_per_output_token_seconds", "The same, under the name of a request's.", TPOT)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", LATENCY)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "From arrival to the first step.", LATENCY)
        self.prefill_time = histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.", LATENCY)
        self.decode_time = histogram("vllm:request_decode_time_seconds", "From the first token to the end.", LATENCY)
        self.inference_time = histogram("vllm:request_inference_time_seconds", "From the first step to the end.", LATENCY)
        self.prompt_size = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", COUNTS)
        self.answer_size = histogram("vllm:request_generation_tokens", "Tokens of an answer.", COUNTS)
        self.iteration = histogram("vllm:iteration_tokens_total", "Tokens of a step.", COUNTS)
        self.step_time = histogram("pascaline:step_seconds", "One forward pass and what belongs to it.", STEP)
        success = Counter("vllm:request_success", "Answers that ended, by why.", ["model_name", "finished_reason"], registry=self.registry)
        self.success = {reason: success.labels(model, reason) for reason in REASONS}
        self.prompt_tokens = 0
        self.registry.register(self)

    def stepped(self, seconds: float, prefilled: int, generated: int) -> None:
        """A step of so many seconds computed so many prompt tokens and answered so many."""
        self.step_time.observe(seconds)
        self.iteration.observe(prefilled + generated)
        self.cost.add(seconds, prefilled, generated)

    def finished(self, request: Any, reason: str | None = None) -> None:
        """An answer has ended; reason: if the engine's own is not what is to be told."""
        reason = reason or ("abort" if request.finish_reason == "cancelled" else request.finish_reason)
        self.success[reason if reason in self.success else "error"].inc()
        now, tokens = request.finished or time.monotonic(), len(request.token_ids)
        if request.index == 0 and request.first_token:
            self.prompt_tokens += len(request.prompt)
            self.cost.input_tokens += len(request.prompt)
            self.prompt_size.observe(len(request.prompt))
        self.answer_size.observe(tokens)
        self.e2e.observe(now - request.arrived)
        if request.scheduled:
            self.queue_time.observe(request.scheduled - request.arrived)
            self.inference_time.observe(now - request.scheduled)
        if request.first_token:
            self.ttft.observe(request.first_token - request.arrived)
            self.prefill_time.observe(request.first_token - request.scheduled)
            self.decode_time.observe(now - request.first_token)
        if tokens > 1:
            each = (now - request.first_token) / (tokens - 1)
            self.inter_token.observe(each)
            self.per_token.observe(each)

    def collect(self) -> Iterator[Metric]:
        """The engine's statistics, as prometheus_client asks for them."""
        stats = self.stats()
        if stats is None:
            return
        for name, attribute, text in STATS:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self.model], self.prompt_tokens if attribute is None else getattr(stats, attribute))
            yield counter
        for name, value, text in (
            ("vllm:num_requests_running", stats.running, "Answers that the engine is at."),
            ("vllm:num_requests_waiting", stats.waiting, "Answers that wait for it."),
            ("vllm:kv_cache_usage_perc", stats.blocks_used / max(stats.blocks, 1), "Share of the cache blocks that answers hold, 0 to 1."),
            ("pascaline:busy_ratio", self.cost.busy(), f"Share of the last {WINDOW:.0f} s in which the engine computed."),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        if self.cost.price:
            told = "Money that a million tokens cost, at the pace of the last minutes, idle time left out."
            price = GaugeMetricFamily("pascaline:price_per_million_tokens", told, labels=["model_name", "kind"])
            for kind, value in self.cost.per_million().items():
                price.add_metric([self.model, kind], value)
            yield price
            spent = CounterMetricFamily("pascaline:cost", "Money spent since the start, idle time too.", labels=["model_name"])
            spent.add_metric([self.model], self.cost.spent())
            yield spent

    def text(self) -> bytes:
        """The page of /metrics."""
        return generate_latest(self.registry)


class Cost:
    """Shares each step's seconds among input and output by the tokens that it computed of both, and prices them.

    What a million input tokens cost counts the cached ones as tokens too: they were served.
    """

    def __init__(self, price_per_hour: float):
        self.price = price_per_hour
        self.began = time.monotonic()
        self.input_seconds = self.output_seconds = 0.0
        self.input_tokens = self.output_tokens = 0
        self._marks: deque[tuple[float, float, float, int, int]] = deque([self._now()])

    def _now(self) -> tuple[float, float, float, int, int]:
        return time.monotonic(), self.input_seconds, self.output_seconds, self.input_tokens, self.output_tokens

    def add(self, seconds: float, prefilled: int, generated: int) -> None:
        share = prefilled / max(prefilled + generated, 1)
        self.input_seconds += seconds * share
        self.output_seconds += seconds * (1 - share)
        self.output_tokens += generated
        if time.monotonic() - self._marks[-1][0] > WINDOW / 60:
            self._marks.append(self._now())
            while len(self._marks) > 1 and self._marks[1][0] < time.monotonic() - WINDOW:
                self._marks.popleft()

    def per_million(self) -> dict[str, float]:
        """{"input": money, "output": money} of a million tokens, 0.0 for a kind that there was none of."""
        then, now = self._marks[0], self._now()
        second = self.price / 3600
        found = {}
        for kind, seconds, tokens in (("input", now[1] - then[1], now[3] - then[3]), ("output", now[2] - then[2], now[4] - then[4])):
            found[kind] = second * seconds / tokens * 1e6 if tokens else 0.0
        return found

    def busy(self) -> float:
        then, now = self._marks[0], self._now()
        return min(1.0, (now[1] - then[1] + now[2] - then[2]) / max(now[0] - then[0], 1e-9))

    def spent(self) -> float:
        return self.price / 3600 * (time.monotonic() - self.began)
