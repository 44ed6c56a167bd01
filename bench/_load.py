"""What the benchmarks of servers share: a model folder, a server in a process of its own, and chats over HTTP."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from _common import CONFIG

from pascaline.data.sources import documents
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.tokenizer import Tokenizer, train

START_SECONDS = 120
CONTEXT = 1024
MIXTURE = CONFIG.model_copy(update={"max_position_embeddings": CONTEXT})
DENSE = ModelConfig(
    model_type="qwen3", vocab_size=CONFIG.vocab_size, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, intermediate_size=768, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0, max_position_embeddings=CONTEXT,
)  # fmt: skip


def make_folder(folder: Path, config: ModelConfig, dtype: torch.dtype) -> Tokenizer:
    """A random model with the benchmarks' tokenizer, learnt from Python's standard library."""
    tokenizer = train((text for text in texts() if len(text) < 100_000), config.vocab_size)
    assert tokenizer.vocab_size == config.vocab_size
    Model(config).init_(0).cast_(dtype).save(folder)
    tokenizer.save(folder)
    return tokenizer


@lru_cache
def texts() -> list[str]:
    return [document.text for document in documents(["stdlib"], 1_000_000, lambda _: None)]


def words(tokenizer: Tokenizer, count: int, seed: int) -> str:
    """A passage of about so many tokens, another one for each seed."""
    draw = random.Random(seed)
    text = draw.choice([text for text in texts() if len(text) > 10_000])
    at = draw.randrange(len(text) - 9_000)
    return tokenizer.decode(tokenizer.encode(text[at : at + 9_000])[:count])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, once it takes requests; ended with SIGTERM. RuntimeError with the end of its log if it never does."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + START_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(port: int) -> bool:
    """Whether it takes requests; transformers has no /ready, but its model is there before its /health."""
    for path in ("ready", "health"):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=2) as answer:
                return answer.status == 200
        except urllib.error.HTTPError as error:
            if error.code != 404:
                return False
        except OSError:
            return False
    return False


def pascaline(folder: Path, port: int, *options: str) -> list[str]:
    fixed = ["--port", str(port), "--dtype", "bfloat16", "--no-ui"]
    return [sys.executable, "-m", "pascaline", "serve", str(folder), *fixed, *options]


@dataclass
class Reply:
    """What came back: seconds from sending to the first piece of text (None: there was none) and to the end, the HTTP status (0: the
    connection broke), the tokens that the server says it read and wrote."""

    status: int = 0
    first: float | None = None
    seconds: float = 0.0
    prompt: int = 0
    written: int = 0
    cached: int = 0
    finish: str | None = None
    error: dict[str, Any] | None = field(default=None, repr=False)


async def chat(port: int, body: dict[str, Any] | bytes, leave: float | None = None) -> Reply:
    """One streamed chat. leave: hang up after so many seconds. The client is a bare socket: it shares the machine with the server."""
    reply, began, writer = Reply(), time.perf_counter(), None
    try:
        async with asyncio.timeout(leave):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            reply.status = int((await reader.readline()).split()[1])
            async for line in reader:
                _read(line, reply, began)
    except TimeoutError:
        reply.finish = "left"
    except (OSError, IndexError, ValueError):
        reply.status = 0
    finally:
        if writer is not None:
            writer.close()
        reply.seconds = time.perf_counter() - began
    return reply


def _read(line: bytes, reply: Reply, began: float) -> None:
    if line.startswith(b'{"error"'):
        reply.error = json.loads(line)["error"]
    if not line.startswith(b"data: {"):
        return
    if reply.first is None and (b'content":"' in line or b'content": "' in line):
        delta = (json.loads(line[6:]).get("choices") or [{}])[0].get("delta", {})
        said = delta.get("content") or delta.get("reasoning_content")
        if said and "<|assistant|>" not in said:  # transformers' continuous batching streams the prompt first
            reply.first = time.perf_counter() - began
    if b'"prompt_tokens"' in line or b'"finish_reason":"' in line or b'"error"' in line:
        chunk = json.loads(line[6:])
        usage = chunk.get("usage") or {}
        reply.error = chunk.get("error", reply.error)
        reply.prompt, reply.written = usage.get("prompt_tokens", reply.prompt), usage.get("completion_tokens", reply.written)
        reply.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or reply.cached
        reply.finish = next((c["finish_reason"] for c in chunk.get("choices", []) if c.get("finish_reason")), reply.finish)


def quantile(values: list[float], q: float) -> float:
    """The smallest value with a share q of the values at or below it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")
