"""One answer as its pieces arrive: thought and text, and the two formats of log-probabilities."""

import math
from collections.abc import Sequence
from typing import Any

from pascaline.engine.transcript import Transcript
from pascaline.serve.service import Job, Piece
from pascaline.tokenizer import Tokenizer

FLOOR = -9999.0  # JSON has no -inf
Entry = tuple[int, float | None, list[tuple[int, float]]]  # token id, its log-probability (None: it has none), alternatives


def finite(logprob: float | None) -> float:
    """A logarithm as JSON can hold it."""
    return max(logprob, FLOOR) if logprob is not None and math.isfinite(logprob) else FLOOR


class Voice:
    """One answer as its pieces arrive. raw: all is text, as completions want it; chats have thoughts."""

    def __init__(self, tokenizer: Tokenizer, job: Job, index: int, raw: bool):
        self.tokenizer, self.request, self.first = tokenizer, job.requests[index], job.requests[0]
        self.transcript = Transcript(tokenizer, job.ids, job.sampling.stop, self.request.stops, thoughts=not raw)
        self.count = 0
        self.finish_reason: str | None = None
        self.entries: list[Entry] = []  # of all tokens
        self._given = 0  # entries that a stream has had

    def take(self, piece: Piece) -> tuple[str, str]:
        """What is new of (thought, text)."""
        reasoning = text = ""
        if self.transcript.stopped is None:
            used = len(piece.ids)
            for i, token in enumerate(piece.ids):  # tokens after a stop string do not count
                more = self.transcript.feed([token])
                reasoning, text = reasoning + more[0], text + more[1]
                if self.transcript.stopped is not None:
                    used = i + 1
                    break
            top = piece.top_logprobs or [[]] * len(piece.ids)
            self.entries += list(zip(piece.ids, piece.logprobs, top, strict=False))[:used]
            self.count += used
        if piece.finish_reason is not None:
            self.finish_reason = "stop" if self.transcript.stopped is not None else piece.finish_reason
            more = self.transcript.finish()
            reasoning, text = reasoning + more[0], text + more[1]
        return reasoning, text

    def prompt_entries(self) -> list[Entry]:
        """The same of the prompt's tokens, if they were asked for."""
        request = self.first
        top = request.prompt_top or [[]] * len(request.prompt)
        return list(zip(request.prompt, request.prompt_logprobs, top, strict=False))

    def chat_logprobs(self, fresh: bool = False) -> dict[str, Any]:
        """For the text's tokens `content`, for the thought's `reasoning_content`. fresh: only what this has not given before, of what is
        settled by now."""
        t = self.transcript
        start, border = (self._given if fresh else 0), t.reasoning_tokens
        end = start if fresh and t.undecided else len(self.entries)
        self._given = end
        ends = self.request.stops
        shown = [(i, _token_logprob(self.tokenizer, *e)) for i, e in enumerate(self.entries[start:end], start) if e[0] not in ends]
        thought = [e for i, e in shown if i < border]
        return {"content": [e for i, e in shown if i >= border]} | ({"reasoning_content": thought} if thought else {})


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> dict[str, Any]:
    def one(token: int, logprob: float | None) -> dict[str, Any]:
        piece = tokenizer.piece(token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(piece)}

    return {**one(token, logprob), "top_logprobs": [one(*t) for t in top]}


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[tuple[int, float | None, Sequence[tuple[int, float]]]], offset: int = 0
) -> tuple[dict[str, Any], int]:
    """The older format, four lists with an entry a token, and the offset of what comes next. A token that is no whole character is
    written "bytes:\\xe6"."""

    def name(token: int) -> str:
        piece = tokenizer.piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)

    found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprob, top in entries:
        found["tokens"].append(name(token))
        found["token_logprobs"].append(None if logprob is None else finite(logprob))
        told = {name(t): finite(p) for t, p in top}
        found["top_logprobs"].append(None if logprob is None else told | {name(token): finite(logprob)})
        found["text_offset"].append(offset)
        offset += len(tokenizer.piece(token).decode("utf-8", "replace"))
    return found, offset
