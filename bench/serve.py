"""Chats over HTTP: tokens per second and time to the first token of many concurrent chats that share a system prompt, against the same
server without prefix reuse and against `transformers serve` on the same weights (pip install 'transformers[serving]').

transformers' continuous batching has no cache for latent attention (5.24: its worker dies at the first request), so on this model it is
measured as it works, one request at a time; and once more with continuous batching, on a dense model of the same width that both can
serve. Every server has a process of its own and is stopped (SIGSTOP) while another has its turn. The user's words differ in every round.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import finish
from _load import DENSE, MIXTURE, Reply, chat, free_port, make_folder, pascaline, quantile, server, words

from pascaline.tokenizer import Tokenizer

FLOORS = {"prefix reuse": 1.5, "transformers": 3.0, "transformers, dense": 3.0}
# The fastest of those tried; asked to find its sizes itself, it takes half a minute to begin and is slower.
BATCHING = ["--continuous-batching", "--cb-num-blocks", "2048", "--cb-max-batch-tokens", "512"]


@dataclass
class Side:
    """A server and what was measured on it."""

    command: list[str]
    port: int
    model: str
    process: subprocess.Popen[bytes] | None = None
    rates: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)


def peer(folder: Path, port: int, *options: str) -> list[str]:
    script = Path(sys.executable).with_name("transformers")
    return [str(script), "serve", str(folder), "--device", "cpu", "--port", str(port), *options]


def unshared(folder: Path, port: int) -> list[str]:
    """`pascaline serve` with an engine that forgets what it has computed."""
    load = f"lambda: Engine({str(folder)!r}, dtype=torch.bfloat16, max_rows=256, prefix_reuse=False)"
    names = ("engine import Engine", "serve.options import Options", "serve.server import serve")
    code = "; ".join(["import torch", *(f"from pascaline.{name}" for name in names)])
    return [sys.executable, "-c", f"{code}; serve({load}, Options(name={folder.name!r}, port={port}, ui=False))"]


def sides(mixture: Path, dense: Path, only: list[str]) -> dict[str, Side]:
    def side(command: Any, folder: Path, *options: str) -> Side:
        port = free_port()
        return Side(command(folder, port, *options), port, str(folder) if command is peer else folder.name)

    made = {
        "pascaline": lambda: side(pascaline, mixture),
        "pascaline, no prefix reuse": lambda: side(unshared, mixture),
        "transformers": lambda: side(peer, mixture),
        "pascaline, dense": lambda: side(pascaline, dense),
        "transformers, dense": lambda: side(peer, dense, *BATCHING),
    }
    return {name: make() for name, make in made.items() if not only or name in only}


def bodies(tokenizer: Tokenizer, count: int, system: int, seed: int) -> list[dict[str, Any]]:
    """Chats with the same system prompt, 8 to 96 tokens of the user's and 16 to 192 tokens to be written."""
    draw = random.Random(seed)
    shared = words(tokenizer, system, 0)
    return [
        {
            "messages": [
                {"role": "system", "content": shared},
                {"role": "user", "content": words(tokenizer, draw.randint(8, 96), 1000 * seed + i + 1)},
            ],
            "max_tokens": draw.randint(16, 192),
            "temperature": 1.0,
            "top_p": 1.0,
            "seed": i,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(count)
    ]


async def together(side: Side, chats: list[dict[str, Any]]) -> list[Reply]:
    return await asyncio.gather(*(chat(side.port, {**body, "model": side.model}) for body in chats))


def turn(name: str, side: Side, chats: list[dict[str, Any]], keep: bool) -> None:
    assert side.process is not None
    side.process.send_signal(signal.SIGCONT)
    began = time.perf_counter()
    replies = asyncio.run(together(side, chats))
    seconds = time.perf_counter() - began
    side.process.send_signal(signal.SIGSTOP)
    bad = [reply for reply in replies if reply.status != 200 or reply.error or not reply.written]
    if bad:
        raise SystemExit(f"{name}: {len(bad)} of {len(replies)} chats failed, the first with {bad[0]} {bad[0].error or ''}")
    if keep:
        side.rates.append(sum(r.prompt + r.written for r in replies) / seconds)
        side.written.append(sum(r.written for r in replies) / seconds)
        side.first += [1000 * r.first for r in replies if r.first is not None]
        side.cached.append(sum(r.cached for r in replies) / sum(r.prompt for r in replies))


def measure(found: dict[str, Side], tokenizer: Tokenizer, chats: int, system: int, rounds: int, logs: Path) -> None:
    with contextlib.ExitStack() as stack:
        for number, (name, side) in enumerate(found.items()):
            side.process = stack.enter_context(server(side.command, side.port, logs / f"{number}.log"))
            turn(name, side, bodies(tokenizer, 2, system, 0), keep=False)
        stack.callback(lambda: [side.process.send_signal(signal.SIGCONT) for side in found.values() if side.process])
        for turn_number in range(1 + rounds):  # the first is to warm up: kernels are made for a shape at its first use
            for name, side in found.items():
                turn(name, side, bodies(tokenizer, chats, system, 1 + turn_number), keep=turn_number > 0)


def report(found: dict[str, Side]) -> dict[str, Any]:
    rate = {name: statistics.median(side.rates) for name, side in found.items()}
    pairs = {
        "prefix reuse": ("pascaline", "pascaline, no prefix reuse"),
        "transformers": ("pascaline", "transformers"),
        "transformers, dense": ("pascaline, dense", "transformers, dense"),
    }
    return {
        "ratio": {name: rate[ours] / rate[other] for name, (ours, other) in pairs.items() if ours in rate and other in rate},
        "floor": FLOORS,
        "tokens_per_s": rate,
        "written_per_s": {name: statistics.median(side.written) for name, side in found.items()},
        "first_token_ms": {name: {"p50": quantile(s.first, 0.5), "p99": quantile(s.first, 0.99)} for name, s in found.items()},
        "cached": {name: statistics.median(side.cached) for name, side in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--system", type=int, default=512, help="tokens of the shared system prompt")
    parser.add_argument("--only", action="append", default=[], help="a server's name, e.g. pascaline (repeatable; default: all)")
    parser.add_argument("--quick", action="store_true", help="8 chats, one round")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers must not outlive this
    if any("transformers" in name for name in options.only or ["transformers"]) and not importlib.util.find_spec("accelerate"):
        raise SystemExit("`transformers serve` needs accelerate: pip install 'transformers[serving]', or name others with --only.")
    chats, rounds = (8, 1) if options.quick else (options.chats, options.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        tokenizer = make_folder(place / "mixture", MIXTURE, torch.bfloat16)
        make_folder(place / "dense", DENSE, torch.bfloat16)
        found = sides(place / "mixture", place / "dense", options.only)
        measure(found, tokenizer, chats, options.system, rounds, place)
    finish({"chats": chats, "rounds": rounds, **report(found)}, options.json)


if __name__ == "__main__":
    main()
