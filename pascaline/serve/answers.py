"""From a request to the engine's jobs, and from their pieces to the answer, whole or streamed."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from pydantic import ValidationError

from pascaline.engine import Sampling
from pascaline.errors import BadInput, describe_validation
from pascaline.serve.options import VERSION, Options
from pascaline.serve.schema import ApiError, ChatRequest, CompletionRequest, Generation
from pascaline.serve.service import Job, Service
from pascaline.serve.stream import DONE, PING, event
from pascaline.serve.voice import Entry, Voice, completion_logprobs
from pascaline.tokenizer import Tokenizer

T = TypeVar("T")
READERS = 2  # threads that render and tokenise; the rest waits its turn
SAME = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "n", "ignore_eos",
        "max_thinking_tokens")  # fmt: skip


class Answers:
    """What routes and chat page ask for. model: the id."""

    def __init__(self, service: Service, options: Options):
        self.service, self.options, self.model = service, options, options.name
        self.created = int(time.time())
        self._reading = asyncio.Semaphore(READERS)

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer: Tokenizer = self.service.engine.tokenizer
        return tokenizer

    @property
    def context(self) -> int:
        return int(self.service.engine.model.config.max_position_embeddings)

    @cached_property
    def fingerprint(self) -> str:
        config = repr(self.service.engine.model.config)
        return "fp_" + hashlib.sha256(f"{VERSION} {self.model} {config}".encode()).hexdigest()[:12]

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            raise ApiError(404, f"There is no model '{name[:200] if name else ''}' here, only '{self.model}'.", "model", "model_not_found")

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:
        """Run what takes its time in a thread, so that streams go on; a few at once."""
        async with self._reading:
            return await asyncio.to_thread(work, *args)

    # ---- requests to jobs --------------------------------------------------------------------------------------------

    async def chat(self, body: ChatRequest, salt: str) -> list[Job]:
        """The job of a chat (one, in a list)."""
        self.check_model(body.model)
        self.service.check_room(body.n or 1, 0)
        self._refuse_long("".join(message.plain()["content"].strip() for message in body.messages), "messages")
        ids = await self.off_loop(self.chat_prompt, body)
        wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        top = body.top_logprobs or 0
        sampling = self.sampling(body, ids, wanted, None, "messages", top_logprobs=top)
        return await self.service.submit([ids], [sampling], salt, whole=not body.stream)

    def chat_prompt(self, body: ChatRequest) -> list[int]:
        if len(body.messages) > self.options.max_messages:
            raise ApiError(400, f"messages: {len(body.messages)} are more than the limit of {self.options.max_messages}.", "messages")
        return self.tokenizer.prompt_ids([message.plain() for message in body.messages], thinking=body.thinks)

    def _refuse_long(self, text: str, param: str) -> None:
        """ApiError 400 for a text that cannot fit, before the time is spent to tokenise it."""
        least, most = self.tokenizer.at_least(text), self.options.max_prompt_tokens or self.context
        if least > most:
            raise ApiError(
                400, f"The prompt has {least} tokens at least and leaves no room: {most} is the most.", param, "context_length_exceeded"
            )

    async def completion(self, body: CompletionRequest, salt: str) -> list[Job]:
        """The jobs of a completion, one a prompt."""
        self.check_model(body.model)
        self.service.check_room(len(body.prompts) * (body.n or 1), 0)
        for prompt in body.prompts:
            if isinstance(prompt, str):
                self._refuse_long(prompt, "prompt")
        prompts = await self.off_loop(lambda: [self.prompt_ids(prompt) for prompt in body.prompts])
        wanted = 16 if body.max_tokens is None else body.max_tokens
        more = {"top_logprobs": body.logprobs or 0, "prompt_logprobs": bool(body.echo) and (body.logprobs is not None or wanted == 0)}
        samplings = [self.sampling(body, ids, wanted, i, "prompt", **more) for i, ids in enumerate(prompts)]
        whole = not body.stream and not body.stops  # the engine does not look for stop strings in what it takes for a thought
        return await self.service.submit(prompts, samplings, salt, whole)

    def prompt_ids(self, prompt: str | list[int], begin: bool = True) -> list[int]:
        """Ids of a raw prompt; special tokens in it are parsed, and what a document begins with is put before it."""
        if not isinstance(prompt, str):
            vocabulary = self.service.engine.model.config.vocab_size
            if max(prompt) >= vocabulary:
                raise ApiError(400, f"prompt: token id {max(prompt)} is not in the vocabulary of {vocabulary}.", "prompt")
            return prompt
        ids = self.tokenizer.encode(prompt, special=True)
        prefix = self.tokenizer.prefix if begin else []
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def sampling(self, body: Generation, ids: list[int], wanted: int | None, number: int | None, param: str, **more: Any) -> Sampling:
        """How to answer a prompt of these ids. number: of the prompt, if there may be several. ApiError 400 for what does not fit."""
        o, vocabulary = self.options, self.service.engine.model.config.vocab_size
        room = self.context - len(ids)
        most = min(room, o.max_tokens) if o.max_tokens else room
        for good, message, where, code in (
            (ids, "The prompt is empty.", param, None),
            (not o.max_prompt_tokens or len(ids) <= o.max_prompt_tokens,
             f"The prompt has {len(ids)} tokens, more than the limit of {o.max_prompt_tokens}.", param, "context_length_exceeded"),
            (room >= min(1, 1 if wanted is None else wanted),
             f"The prompt has {len(ids)} tokens and leaves no room in the context of {self.context}.", param, "context_length_exceeded"),
            ((body.n or 1) <= o.max_n, f"n = {body.n} is more than the limit of {o.max_n}.", "n", None),
            (not o.max_tokens or (wanted or 0) <= o.max_tokens, f"max_tokens = {wanted} is more than the limit of {o.max_tokens}.",
             "max_tokens", None),
            (wanted is None or (body.min_tokens or 0) <= wanted, "min_tokens is more than max_tokens.", "min_tokens", None),
            (all(int(key) < vocabulary for key in body.logit_bias or ()),
             f"logit_bias names a token that is not in the vocabulary of {vocabulary}.", "logit_bias", None),
            (all(token < vocabulary for token in body.stop_token_ids or ()),
             f"stop_token_ids names a token that is not in the vocabulary of {vocabulary}.", "stop_token_ids", None),
        ):  # fmt: skip
            if not good:
                raise ApiError(400, message, where, code)
        given = {name: value for name in SAME if (value := getattr(body, name)) is not None}
        seed = secrets.randbits(63) if body.seed is None else (body.seed + (number or 0)) % (1 << 64)
        return Sampling(
            **given,
            **more,
            max_tokens=most if wanted is None else min(wanted, most),
            top_k=max(body.top_k or 0, 0),
            seed=seed,
            stop=body.stops,
            stop_ids=tuple(body.stop_token_ids or ()),
            logit_bias=tuple((int(key), value) for key, value in (body.logit_bias or {}).items()),
        )

    # ---- jobs to answers ---------------------------------------------------------------------------------------------

    def voices(self, jobs: Sequence[Job], raw: bool) -> list[list[Voice]]:
        return [[Voice(self.tokenizer, job, i, raw) for i in range(job.sampling.n)] for job in jobs]

    async def said(self, jobs: Sequence[Job], voices: list[list[Voice]]) -> AsyncGenerator[tuple[int, Voice, str, str] | None, None]:
        """(index of the choice, its voice, new thought, new text) as they come; None: nothing for a while."""
        n = jobs[0].sampling.n
        async for found in self.service.pieces(jobs):
            if found is None:
                yield None
                continue
            prompt, piece = found
            voice = voices[prompt][piece.index]
            before = voice.transcript.stopped
            reasoning, text = voice.take(piece)
            if voice.transcript.stopped is not None and before is None and piece.finish_reason is None:
                self.service.cut(jobs[prompt], piece.index)
            yield prompt * n + piece.index, voice, reasoning, text

    def usage(self, jobs: Sequence[Job], voices: list[list[Voice]]) -> dict[str, Any]:
        prompt = sum(len(job.ids) for job in jobs)
        said = sum(voice.count for group in voices for voice in group)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": sum(job.requests[0].cached_tokens for job in jobs)},
            "completion_tokens_details": {"reasoning_tokens": sum(v.transcript.reasoning_tokens for group in voices for v in group)},
        }

    def head(self, kind: str, name: str) -> dict[str, Any]:
        fixed = {"object": name, "created": int(time.time()), "model": self.model, "system_fingerprint": self.fingerprint}
        return {"id": f"{kind}-{secrets.token_hex(12)}", **fixed}

    def _thought(self, said: str) -> dict[str, str]:
        """Under DeepSeek's name, and on request under OpenRouter's too."""
        return {"reasoning_content": said} | ({"reasoning": said} if self.options.mirror_reasoning else {})

    async def whole_chat(self, body: ChatRequest, jobs: list[Job]) -> dict[str, Any]:
        voices = self.voices(jobs, raw=False)
        async for _ in self.said(jobs, voices):
            pass
        choices = []
        for i, voice in enumerate(voices[0]):
            thought = voice.transcript.reasoning
            message = {"role": "assistant", "content": voice.transcript.text} | ({} if thought is None else self._thought(thought))
            logprobs = voice.chat_logprobs() if body.logprobs else None
            choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": voice.finish_reason})
        return {**self.head("chatcmpl", "chat.completion"), "choices": choices, "usage": self.usage(jobs, voices)}

    async def streamed_chat(self, body: ChatRequest, jobs: list[Job]) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the role, then thought and text, then the finish reason, for each choice; the usage if asked for."""
        voices = self.voices(jobs, raw=False)
        head = self.head("chatcmpl", "chat.completion.chunk")
        usage = {"usage": None} if body.with_usage else {}

        def chunk(index: int, delta: dict[str, str], reason: str | None = None, logprobs: Any = None) -> bytes:
            return event({**head, "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}], **usage})

        for i in range(len(voices[0])):
            yield chunk(i, {"role": "assistant", "content": ""})
        async for found in self.said(jobs, voices):
            if found is None:
                yield PING
                continue
            index, voice, *said = found
            pieces = [*([self._thought(said[0])] if said[0] else []), *([{"content": said[1]}] if said[1] else [])]
            for delta in pieces:
                own = voice.chat_logprobs(fresh=True) if body.logprobs and delta is pieces[-1] else None
                yield chunk(index, delta, logprobs=own)
            if voice.finish_reason is not None:
                rest = voice.chat_logprobs(fresh=True) if body.logprobs else None
                yield chunk(index, {}, voice.finish_reason, rest if rest and any(rest.values()) else None)
        if body.with_usage:
            yield event({**head, "choices": [], "usage": self.usage(jobs, voices)})
        yield DONE

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, special=True)

    async def whole_completion(self, body: CompletionRequest, jobs: list[Job]) -> dict[str, Any]:
        voices = self.voices(jobs, raw=True)
        async for _ in self.said(jobs, voices):
            pass
        choices: list[dict[str, Any]] = []
        for prompt, group in zip(body.prompts, voices, strict=True):
            for voice in group:
                text = (self._echo(prompt) if body.echo else "") + voice.transcript.text
                logprobs = None
                if body.logprobs is not None:
                    before = voice.prompt_entries() if body.echo else []
                    logprobs, _ = completion_logprobs(self.tokenizer, [*before, *voice.entries])
                choices.append({"index": len(choices), "text": text, "logprobs": logprobs, "finish_reason": voice.finish_reason})
        return {**self.head("cmpl", "text_completion"), "choices": choices, "usage": self.usage(jobs, voices)}

    async def streamed_completion(self, body: CompletionRequest, jobs: list[Job]) -> AsyncGenerator[bytes, None]:
        voices = self.voices(jobs, raw=True)
        head = self.head("cmpl", "text_completion")
        usage = {"usage": None} if body.with_usage else {}
        n = jobs[0].sampling.n
        given = [0] * (n * len(jobs))  # entries of logprobs
        offsets = [0] * (n * len(jobs))
        echoed = [not body.echo] * (n * len(jobs))
        async for found in self.said(jobs, voices):
            if found is None:
                yield PING
                continue
            index, voice, _, text = found
            before: list[Entry] = []
            if not echoed[index]:
                text, echoed[index] = self._echo(body.prompts[index // n]) + text, True
                before = voice.prompt_entries() if body.logprobs is not None else []
            if not text and voice.finish_reason is None:
                continue
            logprobs = None
            if body.logprobs is not None:
                fresh = voice.entries[given[index] :]
                given[index] += len(fresh)
                logprobs, offsets[index] = completion_logprobs(self.tokenizer, [*before, *fresh], offsets[index])
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": voice.finish_reason}
            yield event({**head, "choices": [choice], **usage})
        if body.with_usage:
            yield event({**head, "choices": [], "usage": self.usage(jobs, voices)})
        yield DONE

    # ---- for the page ------------------------------------------------------------------------------------------------

    async def stream_chat(self, messages: list[dict[str, str]], **settings: Any) -> AsyncGenerator[tuple[str, Any], None]:
        """An answer in this process: ("reasoning", piece), ("content", piece), ..., ("end", usage), in this order.

        messages: {"role", "content"} each. settings: any field of ChatRequest but n, stream and logprobs: temperature, top_p, max_tokens,
        thinking (bool), max_thinking_tokens (None: no limit), seed, stop, ... usage: the API's, with "finish_reason" ("stop" or "length").
        Closing the iterator cancels the answer. BadInput for what the client did wrong (a full queue too), ApiError 5xx for the rest.
        """
        if self.options.max_tokens:  # the page has a slider, and does not know the limit
            settings["max_tokens"] = min(settings.get("max_tokens") or self.options.max_tokens, self.options.max_tokens)
        try:
            body = ChatRequest.model_validate({"messages": messages, **settings, "n": 1, "stream": True})
        except ValidationError as error:
            raise BadInput(describe_validation(error, "chat", ChatRequest.model_fields)) from None
        jobs: list[Job] = []
        try:
            jobs = await self.chat(body, "")
            voices = self.voices(jobs, raw=False)
            async for found in self.said(jobs, voices):
                for kind, piece in zip(("reasoning", "content"), found[2:] if found else (), strict=False):
                    if piece:
                        yield kind, piece
            yield "end", {**self.usage(jobs, voices), "finish_reason": voices[0][0].finish_reason}
        except ApiError as error:
            if error.status < 500:
                raise BadInput(error.message) from None
            raise
        finally:
            self.service.close_all(jobs)


def model_card(answers: Answers) -> dict[str, Any]:
    """What /v1/models says of the model."""
    known = {"id": answers.model, "object": "model", "created": answers.created, "owned_by": "pascaline"}
    return {**known, "max_model_len": answers.context}


def first_problem(errors: Sequence[Any]) -> ApiError:
    """The deepest of pydantic's errors, without what the client has sent."""
    error = max(errors, key=lambda e: len(e["loc"]))
    names = {"str", "int", "body", "list[TextPart]", "list[str]", "list[int]"}
    path = [str(part) for part in error["loc"] if str(part) not in names and not str(part).startswith(("list[", "constrained", "function"))]
    path += [error["ctx"]["param"]] if error["type"] == "wrong" else []
    param = ".".join(path)[:200] or None
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        param, message = None, "The body is not valid JSON."
    elif param is None:
        message = "The body must be a JSON object, with the content-type application/json."
    return ApiError(400, f"{param}: {message}" if param else message, param)
