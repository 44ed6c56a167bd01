"""The real application on a port of this machine, for clients that want a URL."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pascaline.serve.api import app
from pascaline.serve.options import Options
from pascaline.serve.server import Server


@dataclass
class Live:
    """A server that runs. engine: to be looked at only, its thread is the server's."""

    url: str
    port: int
    engine: Any
    service: Any

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether, soon, nothing waits or runs and no block is held."""
        return eventually(lambda: not self.engine.busy and not self.service.jobs and self.held == 0, seconds)

    @property
    def held(self) -> int:
        blocks = getattr(self.engine, "_blocks", None)
        return int(blocks.used if blocks is not None else self.engine.stats.blocks_used)


def eventually(true: Callable[[], Any], seconds: float = 10.0) -> bool:
    """Wait until it is true; False if it never was."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextlib.contextmanager
def served(engine: Any, **options: Any) -> Iterator[Live]:
    """Serve `engine` as `pascaline serve` does, but in a thread, until the block ends."""
    told = Options(**{"name": "tiny", "ui": False, **options})
    made = app(engine, told)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)
        port = listening.getsockname()[1]
        server = Server(made, told, port, lambda _: None)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
        thread.start()
        try:
            assert eventually(lambda: server.started and made.state.service.ready, 30)
            yield Live(f"http://127.0.0.1:{port}", port, made.state.service.engine, made.state.service)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
