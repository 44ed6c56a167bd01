"""Answers to a client that may go away: what it waits for is cancelled then, streamed or not."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pascaline.errors import BadInput
from pascaline.serve.limits import dumps
from pascaline.serve.schema import ApiError
from pascaline.serve.service import FAILED

log = logging.getLogger(__name__)
T = TypeVar("T")
DONE, PING = b"data: [DONE]\n\n", b": ping\n\n"


class Gone(Exception):
    """The client has closed the connection."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T], drop: Callable[[T], None] | None = None) -> T:
    """The result of `work`; raises Gone, with the work cancelled and its cleanup done, as soon as the client is gone. `drop` gets a result
    that came too late, when this was cancelled."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)
    except asyncio.CancelledError:
        if drop is not None and working.done() and not working.cancelled() and working.exception() is None:
            drop(working.result())
        raise
    if working.cancelled():
        raise Gone
    return working.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"


class EventStream(Response):
    """Server-sent events from `events` (bytes, each whole). `close` is called at the end, also if the client is gone before they began.
    An error in the middle is an event with an error object, and the end."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.events, self.close = events, close
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except (Gone, OSError):
            pass
        finally:
            self.close()  # the events, if they have not begun, do not know
            await self.events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for piece in self.events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (ApiError, BadInput) as error:
            failed = error if isinstance(error, ApiError) else ApiError(400, str(error))
            await send({"type": "http.response.body", "body": event(failed.body), "more_body": True})
        except OSError:
            raise
        except Exception:
            log.exception("a stream failed")
            await send({"type": "http.response.body", "body": event(ApiError(500, FAILED).body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
