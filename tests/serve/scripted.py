"""A backend for the chat page that says what a test wrote down, piece by piece, and tells what became of its streams."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

Script = list[tuple[str, Any]]


class Scripted:
    """scripts: question -> pieces, or a list of them, one a branch (by seed). ("wait", seconds) waits; ("raise", error) raises."""

    model = "pascaline-demo"

    def __init__(self, scripts: dict[str, Any]) -> None:
        self.scripts = scripts
        self.asked: list[tuple[list[dict[str, str]], dict[str, Any]]] = []
        self.running = 0
        self.cancelled = 0

    async def stream_chat(self, messages: list[dict[str, str]], **settings: Any) -> AsyncGenerator[tuple[str, Any], None]:
        self.asked.append((messages, settings))
        script = self.scripts[messages[-1]["content"]]
        if isinstance(script[0], list):
            script = script[settings["seed"] % len(script)]
        self.running += 1
        ended = False
        try:
            for kind, piece in script:
                if kind == "wait":
                    await asyncio.sleep(piece)
                elif kind == "raise":
                    raise piece
                else:
                    yield kind, piece
            ended = True
        finally:
            self.running -= 1
            self.cancelled += not ended


def usage(tokens: int, finish_reason: str = "stop") -> tuple[str, dict[str, Any]]:
    return "end", {"completion_tokens": tokens, "finish_reason": finish_reason}
