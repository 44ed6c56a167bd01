"""What a server may be told, with its bounds."""

import re
from dataclasses import dataclass
from pathlib import Path

from pascaline.errors import BadInput
from pascaline.runs import versions

VERSION = versions()["pascaline"] or "unknown"

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@dataclass(frozen=True)
class Options:
    """name: the model's id. max_queue, max_queue_tokens: answers and prompt tokens that wait. max_prompt_tokens, max_tokens: of a request,
    0: what the context allows. max_n: answers of a prompt; max_body, max_headers: bytes. rate: requests a minute, concurrency: requests
    at once, both of one key (or of all clients where there are no keys), 0: no limit. price_per_hour: of the machine, in any currency.
    ping_seconds: a stream that has nothing to say sends a comment so often. body_seconds: in which a body must arrive.
    mirror_reasoning: thoughts are told as `reasoning` too."""

    name: str = "model"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    max_queue: int = 1024
    max_queue_tokens: int = 1 << 20
    max_prompt_tokens: int = 0
    max_tokens: int = 0
    max_n: int = 64
    max_messages: int = 1024
    max_body: int = 4 << 20
    max_headers: int = 16 << 10
    rate: float = 0.0
    concurrency: int = 0
    drain_seconds: float = 30.0
    ping_seconds: float = 15.0
    body_seconds: float = 30.0
    price_per_hour: float = 0.0
    mirror_reasoning: bool = False
    ui: bool = True

    def __post_init__(self) -> None:
        positive = ("max_queue", "max_queue_tokens", "max_n", "max_messages", "max_body", "max_headers", "ping_seconds", "body_seconds")
        for name in positive:
            if not 0 < getattr(self, name) < 1 << 62:
                raise BadInput(f"{_flag(name)} {getattr(self, name)} is out of range: it must be positive.")
        for name in ("max_prompt_tokens", "max_tokens", "rate", "concurrency", "drain_seconds", "price_per_hour"):
            if not 0 <= getattr(self, name) < 1 << 62:
                raise BadInput(f"{_flag(name)} {getattr(self, name)} is out of range: it must not be negative.")
        if not 0 <= self.port < 1 << 16:
            raise BadInput(f"--port {self.port} is out of range: 0 (any free one) to 65535.")
        if not re.fullmatch(r"[\w.:/@+-]{1,200}", self.name, re.ASCII):
            raise BadInput("--name must be 1 to 200 letters, digits and the characters . : / @ + - _")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_size(text: str) -> int:
    """Bytes of "2GiB", "500 MB" or "1048576". BadInput for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS:
        raise BadInput(f"'{text}' is no size; write for example 2GiB or 500MB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def default_name(folder: Path) -> str:
    """The model's id from its folder: runs/demo/model is "demo"."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name == "model" else folder.name
    return re.sub(r"[^\w.:@+-]", "-", name, flags=re.ASCII)[:200] or "model"
