"""A server at overload: long, short, cancelled and invalid chats over HTTP, more at a time than it takes, for a while.

What counts: it lives; its memory stays (resident set at the end over that at the end of the first tenth); nothing is held when all have
gone; and what it writes under overload is near its peak, tokens per second of the same mixture with as many chats at a time as it computes.
"""

import argparse
import asyncio
import gc
import json
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _common import finish
from _load import MIXTURE, Reply, chat, free_port, make_folder, pascaline, quantile, server

from pascaline.tokenizer import Tokenizer

ROWS, QUEUE = 32, 64  # answers computed at once, and that may wait
CLIENTS = 112  # at a time, more than the server takes
KINDS = {"short": 0.45, "long": 0.2, "cancelled": 0.2, "invalid": 0.1, "several": 0.05}
INVALID: list[dict[str, Any] | bytes] = [
    {"messages": []},
    {"messages": [{"role": "user", "content": "hi"}], "temperature": 9},
    {"messages": [{"role": "user", "content": "hi"}], "n": 10**9},
    {"messages": [{"role": "user", "content": "hi"}], "logit_bias": {"AI": 1}},
    {"messages": [{"role": "user", "content": "word " * 100_000}]},
    {"messages": [{"role": "user", "content": "hi"}], "model": "another"},
    b"[" * 1_000_000,
    b'{"messages":[{"role":"user","content":"\\ud800"}]}',
    b"\x80\x04",
]


WORDS, SHARED = ("make", "12", "from", "6", "and", "the", "mat"), "You answer in few words."


def tokens_per_word(folder: Path) -> float:
    said = f"{' '.join(WORDS)} {SHARED}"
    return len(Tokenizer.load(folder).encode(said)) / len(said.split())


def body(draw: random.Random, kind: str, context: int, per_word: float = 1.0) -> dict[str, Any] | bytes:
    """A chat of a kind. Half of the prompts share their beginning."""
    if kind == "invalid":
        return draw.choice(INVALID)
    size = int((draw.randint(context // 4, context // 2) if kind == "long" else draw.randint(1, context // 16)) / per_word)
    shared = [SHARED] * (size // 10) if draw.random() < 0.5 else []
    said = " ".join([*shared, *(draw.choice(WORDS) for _ in range(size // 2))])
    most = draw.randint(context // 8, context // 4) if kind in ("long", "cancelled") else draw.randint(1, context // 16)
    more = {"n": 4} if kind == "several" else {}
    how = {"max_tokens": most, "temperature": 1.0, "top_p": 1.0, "seed": draw.randrange(1 << 30), "stream": True, "ignore_eos": True}
    return {"messages": [{"role": "user", "content": said}], **how, **more, "stream_options": {"include_usage": True}}


class Load:
    """So many clients, each with one chat after the other until the time is over and enough have been answered."""

    def __init__(self, port: int, context: int, per_word: float, seed: int):
        self.port, self.context, self.per_word, self.draw = port, context, per_word, random.Random(seed)
        self.replies: list[tuple[str, Reply]] = []
        self.answered = 0
        self.written = 0.0  # tokens per second while all clients were there
        self.memory: list[float] = []  # MiB, ten times a tenth of that time

    async def run(self, clients: int, seconds: float, least: int, pid: int) -> None:
        self.least, self.over = least, False
        running = [asyncio.create_task(self.client()) for _ in range(clients)]
        began, before = time.perf_counter(), metrics(self.port)
        while not self.over:
            self.memory.append(resident(pid))
            await asyncio.sleep(seconds / 100)
            self.over = time.perf_counter() - began >= seconds and self.answered >= least
        took, after = time.perf_counter() - began, await asyncio.to_thread(metrics, self.port)
        self.written = (after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]) / took
        await asyncio.gather(*running)

    async def client(self) -> None:
        while not self.over:
            (kind,) = self.draw.choices(list(KINDS), list(KINDS.values()))
            leave = self.draw.uniform(0.0, 2.0) if kind == "cancelled" else None
            reply = await chat(self.port, body(self.draw, kind, self.context, self.per_word), leave)
            self.replies.append((kind, reply))
            self.answered += reply.status != 429
            if reply.status == 429:
                await asyncio.sleep(self.draw.uniform(1.0, 2.0))  # its Retry-After says 1

    def check(self) -> Counter[str]:
        """How the chats ended. SystemExit for an end that may not be."""
        ends: Counter[str] = Counter()
        for kind, reply in self.replies:
            good = {"invalid": (400, 404, 413, 429), "cancelled": (0, 200, 429)}.get(kind, (200, 429))
            if reply.status not in good or (reply.error and reply.status == 200):
                raise SystemExit(f"a chat of the kind {kind} ended with {reply} {reply.error or ''}")
            if reply.status == 200 and kind != "cancelled" and reply.finish not in ("stop", "length"):
                raise SystemExit(f"a chat of the kind {kind} has no end: {reply}")
            ends["refused" if reply.status == 429 else "left" if reply.finish == "left" else kind] += 1
        return ends


def metrics(port: int) -> dict[str, float]:
    """Every sample of /metrics, by its name (and bucket)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", text, re.M):
        bucket = re.search(r'le="([^"]+)"', labels)
        key = f"{name} {bucket[1]}" if bucket else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


def step_quantile(before: dict[str, float], after: dict[str, float], q: float) -> float:
    """Upper end of the histogram's bucket in which the quantile of the steps between the two lies, in seconds."""
    prefix = "pascaline:step_seconds_bucket "
    counts = sorted((float(key.removeprefix(prefix)), after[key] - before.get(key, 0.0)) for key in after if key.startswith(prefix))
    return next(edge for edge, count in counts if count >= q * counts[-1][1])


def resident(pid: int) -> float:
    """MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def idle(port: int, seconds: float = 30.0) -> dict[str, float]:
    """The metrics once all are gone; a last short chat shows that the server still answers, and makes the engine count again."""
    reply = asyncio.run(chat(port, body(random.Random(0), "short", 64)))
    if reply.status != 200 or reply.finish is None:
        raise SystemExit(f"the server did not answer at the end: {reply} {reply.error or ''}")
    end = time.monotonic() + seconds
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while True:
        now = metrics(port)
        if not any(now[name] for name in names) or time.monotonic() > end:
            return {name: now[name] for name in names}
        time.sleep(0.2)


def soak(folder: Path, port: int, pid: int, seconds: float, least: int) -> dict[str, Any]:
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    loads = [Load(port, context, tokens_per_word(folder), seed) for seed in range(4)]
    for load in loads[:-1]:  # the first is to warm up
        asyncio.run(load.run(ROWS, max(seconds / 20, 5), 0, pid))
        load.check()
    before, load = metrics(port), loads[-1]
    began = time.perf_counter()
    asyncio.run(load.run(CLIENTS, seconds, least, pid))
    took, after = time.perf_counter() - began, metrics(port)
    ends, held = load.check(), idle(port)
    count, peak = len(load.memory), max(calm.written for calm in loads[1:-1])
    tenths = [load.memory[min(count * tenth // 10, count - 1)] for tenth in range(1, 11)]
    first = [1000 * reply.first for _, reply in load.replies if reply.first is not None]
    return {
        "requests": len(load.replies),
        "seconds": took,
        "ends": dict(ends),
        "resident_mib": tenths,
        "growth": tenths[-1] / tenths[0] - 1,
        "step_ms": {f"p{q}": 1000 * step_quantile(before, after, q / 100) for q in (50, 99)},
        "first_token_ms": {"p50": quantile(first, 0.5), "p99": quantile(first, 0.99)},
        "written_per_s": {"peak": peak, "overload": load.written},
        "of_the_peak": load.written / peak,
        "held_at_the_end": held,
        "floor": {"growth": 0.05, "of_the_peak": 0.9},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a model folder (default: the benchmarks' random model)")
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--seconds", type=float, default=600.0, help="of overload")
    parser.add_argument("--requests", type=int, default=2000, help="at least, however long it takes")
    parser.add_argument("--quick", action="store_true", help="30 seconds, as many requests as there are")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server must not outlive this
    gc.disable()  # the clients share the machine with the server, and remember all replies
    seconds, least = (30.0, 0) if options.quick else (options.seconds, options.requests)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "model"
        if options.model is None:
            make_folder(folder, MIXTURE, torch.bfloat16)
        port = free_port()
        command = pascaline(folder, port, "--max-rows", str(ROWS), "--max-queue", str(QUEUE))
        with server(command, port, Path(scratch) / "log") as process:
            result = soak(folder, port, process.pid, seconds, least)
            process.send_signal(signal.SIGTERM)
            result["exit"] = process.wait(60)
            result["log"] = [line for line in (Path(scratch) / "log").read_text(errors="replace").splitlines() if " INFO " not in line][-5:]
    finish(result, options.json)


if __name__ == "__main__":
    main()
