"""What a request may hold and what an answer holds. Unknown fields are ignored; every number has two bounds.

The fields are those of the OpenAI API (reference: its OpenAPI description), and beside them top_k, min_p, repetition_penalty, min_tokens,
stop_token_ids, ignore_eos, thinking, max_thinking_tokens and chat_template_kwargs, named as in vLLM and DeepSeek.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

MOST_TOKENS = 1 << 24
MOST_IDS = 1 << 32
MOST_N = 128
MOST_TOP = 20
MOST_PROMPTS = 256

Text = Annotated[str, Field(max_length=1 << 26)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Id = Annotated[int, Field(ge=0, lt=MOST_IDS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class ApiError(Exception):
    """An answer that is an error object (docs/serving.md)."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
            503: "unavailable_error",
        }
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> PydanticCustomError:
    """What a validator of several fields raises about one of them."""
    return PydanticCustomError("wrong", "{message}", {"param": param, "message": message})


class Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class TextPart(Request):
    """Text is all that is taken; an image or any other address is refused, and nothing is ever fetched."""

    type: Literal["text"]
    text: Text


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _said(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise wrong("content", "must be a string or a list of text parts")
        return self

    def plain(self) -> dict[str, Any]:
        """As the chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        said = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return said | ({"reasoning_content": self.reasoning_content} if self.reasoning_content and self.role == "assistant" else {})


class StreamOptions(Request):
    include_usage: bool | None = None


class TemplateKwargs(BaseModel):
    """The two names under which a template may be told not to think, and nothing else."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    thinking: bool | None = None
    enable_thinking: bool | None = None


class TextFormat(Request):
    type: Literal["text"]


class Generation(Request):
    """What chats and completions have in common."""

    model: Annotated[str, Field(max_length=512)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_IDS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_N)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=64)] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    max_thinking_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in value):
            raise ValueError("its keys must be token ids, written as numbers")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1 << 16)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    thinking: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "needs logprobs: true")
        return self

    @property
    def thinks(self) -> bool:
        more = self.chat_template_kwargs or TemplateKwargs()
        return next((v for v in (self.thinking, more.thinking, more.enable_thinking) if v is not None), True)


Ids = Annotated[list[Id], Field(min_length=1, max_length=MOST_TOKENS)]


class CompletionRequest(Generation):
    prompt: Text | Ids | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)] | Annotated[
        list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)
    ]  # fmt: skip
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_N)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise wrong("max_tokens", "0 needs echo: true")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise wrong("best_of", "must be n, or be left out: every answer is returned")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        found: list[Any] = self.prompt
        return [found] if isinstance(found[0], int) else found


class TokenizeRequest(Request):
    """Either a prompt or messages."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1 << 16)] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "give either this or messages")
        return self


# ---- answers, for /openapi.json ----------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class Alternative(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    reasoning_content: list[TokenLogprob] | None = None


class Said(BaseModel):
    role: Literal["assistant"]
    content: str
    reasoning_content: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Head(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatAnswer(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionAnswer(Head):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Tokens(BaseModel):
    count: int
    tokens: list[int]
    max_model_len: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str
