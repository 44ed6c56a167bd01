"""A client of the server in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from pascaline.serve.api import app
from pascaline.serve.options import Options


@asynccontextmanager
async def connected(engine: Any, headers: dict[str, str] | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app that is ready; `client.app` is it."""
    made = app(engine, Options(**options))
    async with made.router.lifespan_context(made):
        while not made.state.service.ready:
            await asyncio.sleep(0.001)
        transport = httpx.ASGITransport(made, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers, timeout=60) as client:
            client.app = made
            yield client
