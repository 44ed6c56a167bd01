"""The process: a socket, a model, and an end that lets those who wait have their answers."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from pascaline.errors import BadInput
from pascaline.serve.api import app
from pascaline.serve.limits import escaped, read_keys
from pascaline.serve.options import Options
from pascaline.serve.service import Service

log = logging.getLogger(__name__)
LAST_WORDS = 5  # seconds that answers which are cut off have to say so


def _say(line: str) -> None:
    print(line, flush=True)


def serve(load: Callable[[], Any], options: Options, told: Callable[[str], None] = _say) -> None:
    """Serve until SIGTERM or Ctrl-C: then nothing new is taken, and what runs has options.drain_seconds to end.

    load: makes the engine; it runs while the server is up already and says 503. BadInput for a port in use, a bad key file, a bad model.
    """
    if options.api_key_file is not None:
        read_keys(options.api_key_file)
    elif not _loopback(options.host):
        told(f"Warning: {options.host} can be reached by others and there are no keys; --api-key-file FILE asks for them.")
    _log()
    with contextlib.closing(_bound(options)) as listener:
        made = app(load, options, _page(options, told))
        server = Server(made, options, listener.getsockname()[1], told)
        server.run(sockets=[listener])
        failure = made.state.service.failure
    if failure is not None:
        raise failure


def engine_of(model: Path, device: str, dtype: str, max_rows: int, cache_memory: int | None, max_batch_tokens: int) -> Callable[[], Any]:
    """What loads the engine of a model folder; torch is imported then, so that a mistake in the options is told before."""

    def load() -> Any:
        import torch

        from pascaline.engine import Engine

        return Engine(model, device=device, dtype=getattr(torch, dtype), max_rows=max_rows, cache_memory=cache_memory,
                      max_batch_tokens=max_batch_tokens, speculate=True)  # fmt: skip

    return load


def _log() -> None:
    """One line an event on stderr, whatever somebody has put into it."""
    root = logging.getLogger("pascaline.serve")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it tells of every write to a client that has gone


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bound(options: Options) -> socket.socket:
    """The socket, taken before the model is loaded: a port in use is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise BadInput(f"--host {escaped(options.host)} is no address of this machine: {error.strerror}.") from error
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        raise BadInput(
            f"{options.host}:{options.port} cannot be used: {(error.strerror or str(error)).lower()}; name another --port."
        ) from error
    return made


def _page(options: Options, told: Callable[[str], None]) -> Callable[[FastAPI, Any], None] | None:
    """What mounts the chat page, None without it."""
    if not options.ui or importlib.util.find_spec("gradio") is None or importlib.util.find_spec("pascaline.serve.chat") is None:
        return None
    if options.api_key_file is not None:
        told("No chat page: a browser has no key. The page is there when the server has no --api-key-file.")
        return None
    return importlib.import_module("pascaline.serve.chat").mount


class Server(uvicorn.Server):
    """uvicorn's, but a signal lets running answers end first, and the process then ends with 0. A second signal ends it at once."""

    def __init__(self, made: FastAPI, options: Options, port: int, told: Callable[[str], None]):
        quiet = {"version": 1, "disable_existing_loggers": False}
        settings: dict[str, Any] = {"log_config": quiet, "log_level": "warning", "access_log": False, "server_header": False, "ws": "none"}
        super().__init__(uvicorn.Config(made, http="h11", h11_max_incomplete_event_size=4 * options.max_headers, lifespan="on",
                                        timeout_graceful_shutdown=LAST_WORDS, **settings))  # fmt: skip
        self.options, self.port, self.told = options, port, told
        self.service: Service = made.state.service
        self.deadline: float | None = None
        self.announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.deadline is not None:
            logging.getLogger("uvicorn.error").disabled = True  # it would show what it was in the middle of
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self.deadline = time.monotonic() + self.options.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        if not self.announced and self.service.ready:
            self.announced = True
            self._announce()
        if self.service.failure is not None:
            return True
        if self.deadline is not None and (not self.service.jobs or time.monotonic() > self.deadline):
            self.service.stop()  # what still runs is told so
            await asyncio.sleep(0)
            return True
        return bool(await super().on_tick(counter))

    def _announce(self) -> None:
        engine = self.service.engine
        size, room = engine.bytes_per_token(), engine.capacity
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        self.told(f"Model {self.options.name} on {engine.model.device}: {size:,} bytes of cache a token, room for {room:,} tokens.")
        self.told(f"Ready on http://{host}:{self.port}/v1 (Ctrl-C stops it).")
