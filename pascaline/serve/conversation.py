"""What the chat page shows, and the work of one question: k streams that fill k branches, and the tally of their answers."""

import asyncio
import logging
import re
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from pascaline.errors import BadInput, describe_validation

TICK = 0.1  # seconds between two pictures of a running answer
log = logging.getLogger(__name__)


class Backend(Protocol):
    """What answers. model: its name, for the page."""

    model: str

    def stream_chat(self, messages: list[dict[str, str]], **settings: Any) -> AsyncGenerator[tuple[str, Any], None]:
        """Pairs ("reasoning", piece), ("content", piece) and at last ("end", usage); closing it cancels the request, BadInput refuses it.

        settings: temperature, top_p, max_tokens, thinking, max_thinking_tokens (None: no limit), seed.
        """
        ...


class Shown(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Branch(Shown):
    """One answer. seconds: of its thought; tokens: all that were generated, 0 while it runs and when it was stopped."""

    state: Literal["waiting", "thinking", "answering", "done", "cut", "stopped", "failed"] = "waiting"
    thought: str = ""
    answer: str = ""
    seconds: float = 0.0
    tokens: int = 0
    error: str = ""
    _began: float = PrivateAttr(0.0)

    def take(self, kind: str, piece: Any) -> None:
        """One pair of the backend's stream."""
        if kind == "reasoning":
            self._began = self._began or time.monotonic()
            self.state, self.thought = "thinking", self.thought + piece
        elif kind == "content":
            self.tick()
            self.state, self.answer = "answering", self.answer + piece
        elif kind == "end":
            self.tick()
            self.state = "cut" if piece.get("finish_reason") == "length" else "done"
            self.tokens = piece.get("completion_tokens", 0)

    def tick(self) -> None:
        """Let the thought's clock go on."""
        if self.state == "thinking":
            self.seconds = time.monotonic() - self._began

    def end(self, state: Literal["stopped", "failed"], error: str = "") -> None:
        """End it before its time; what is there stays."""
        if self.state in ("waiting", "thinking", "answering"):
            self.tick()
            self.state, self.error = state, error


class Group(Shown):
    """Branches with the same final answer."""

    answer: str
    branches: list[int]


class Turn(Shown):
    """One question and its k answers. tally: of the answers so far, the most votes first, of equals the first branch's."""

    question: str
    branches: Annotated[list[Branch], Field(min_length=1)]
    tally: list[Group] = []

    @property
    def answer(self) -> str:
        """What the conversation goes on with: the winner's answer."""
        votes = tally(self.branches)
        return self.branches[votes[0].branches[0] if votes else 0].answer


class Conversation(Shown):
    """number: New chat counts it up, so that the page knows an older one's last words when they come too late."""

    number: int = 0
    turns: list[Turn] = []

    def messages(self, system: str, question: str) -> list[dict[str, str]]:
        """The chat that asks `question`. Earlier thoughts are left out, and so are questions whose answer never began."""
        turns = [{"role": "system", "content": system}] if system.strip() else []
        for turn in self.turns:
            if turn.answer.strip():
                turns += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return [*turns, {"role": "user", "content": question}]


def read(value: Any) -> Conversation:
    """The page's own copy of the conversation as the browser sends it back; BadInput if somebody wrote it by hand and badly."""
    try:
        return Conversation.model_validate(value or {})
    except ValidationError as error:
        raise BadInput(describe_validation(error, "conversation", Conversation.model_fields)) from None


def final(answer: str) -> str:
    r"""What of an answer is put to the vote: the last \boxed{...}, else the last line, without marks and capitals; "" if there is none."""
    at = answer.rfind("\\boxed{")
    line = _braced(answer[at + 7 :]) if at >= 0 else next((s for s in reversed(answer.splitlines()) if s.strip()), "")
    line = re.sub(r"(?i)^[\s*_#>-]*(?:the )?(?:final )?answer(?: is)?\s*[:=]?\s*(?=\S)", "", line)
    line = re.sub(r"(?<!\w)\*\*(\S(?:.*?\S)?)\*\*(?!\w)", r"\1", line)  # bold; 2**3**2 is none
    return " ".join(line.split()).strip(" .*_`$").casefold()


def _braced(text: str) -> str:
    """`text` up to the brace that closes what was open before it."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:i]
    return text


def tally(branches: list[Branch]) -> list[Group]:
    """Majority vote: branches that ended by themselves with an answer have one vote each."""
    votes: dict[str, list[int]] = defaultdict(list)
    for i, branch in enumerate(branches):
        if branch.state == "done" and final(branch.answer):
            votes[final(branch.answer)].append(i)
    return [Group(answer=answer, branches=who) for answer, who in sorted(votes.items(), key=lambda item: -len(item[1]))]


async def answer(
    backend: Backend, messages: list[dict[str, str]], turn: Turn, settings: Mapping[str, Any], stopped: Callable[[], bool]
) -> AsyncGenerator[None, None]:
    """Fill the turn's branches, branch i with seed + i; yields every TICK, so that the page can be drawn again.

    Ends at the latest a TICK after `stopped()`, or when it is closed; the streams are closed then, and what they said stays.
    """
    streams = [backend.stream_chat(messages, **{**settings, "seed": settings["seed"] + i}) for i in range(len(turn.branches))]
    tasks = {asyncio.create_task(_follow(*pair)) for pair in zip(streams, turn.branches, strict=True)}
    left = tasks
    try:
        while left and not stopped():
            _, left = await asyncio.wait(left, timeout=TICK)
            for branch in turn.branches:
                branch.tick()
            turn.tally = tally(turn.branches) if len(turn.branches) > 1 else []
            yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for branch in turn.branches:
            branch.end("stopped")


async def _follow(stream: AsyncGenerator[tuple[str, Any], None], branch: Branch) -> None:
    try:
        async with aclosing(stream):
            async for kind, piece in stream:
                branch.take(kind, piece)
    except BadInput as error:
        branch.end("failed", str(error))
    except Exception:
        log.exception("an answer on the chat page failed")
        branch.end("failed", "The server failed on this answer.")
