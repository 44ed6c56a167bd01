"""One answer in the making, and the finished one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pascaline.engine.sampler import Sampling

if TYPE_CHECKING:
    from pascaline.engine.transcript import Transcript

Top = list[tuple[int, float]]  # (token id, log-probability), the most likely first


@dataclass
class Output:
    """One answer. reasoning is what stands before </think>, text what stands after (Tokenizer.thought); a thought that was never closed
    leaves text empty. finish_reason: "stop" (an end token or a stop string), "length", "cancelled" or "error". logprobs are the model's
    own (temperature 1, nothing cut off), one a token. routes, of an engine that records them: the K experts that each of the M layers with
    experts used for each token of prompt and answer, [t, M, K]; E, the number of experts, for the last one, which was never computed."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str = ""
    reasoning: str | None = None
    top_logprobs: list[Top] = field(default_factory=list)
    routes: np.ndarray | None = field(default=None, repr=False, compare=False, kw_only=True)

    @property
    def record(self) -> dict[str, np.ndarray]:
        """The stream of a document, prompt and answer, that holds the routes, if there are any."""
        return {} if self.routes is None else {"routes": self.routes}


@dataclass(eq=False)
class Request:
    """One answer to be sampled; `index` of the n that were asked for. Times are time.monotonic()'s, 0 until then."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    index: int = 0
    salt: str = ""
    stops: frozenset[int] = frozenset()
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Top] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top: list[Top] = field(default_factory=list)
    limit: int = 0  # of tokens to be said
    transcript: Transcript | None = None  # where its words decide how it goes on
    finish_reason: str | None = None
    error: str | None = None
    output: Output | None = None
    cached_tokens: int = 0  # of the prompt
    arrived: float = field(default_factory=time.monotonic)
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    # What the scheduler knows of it:
    number: int = 0  # in the order of arrival
    forks: list[Request] = field(default_factory=list, repr=False)  # answers to the same prompt, which wait until it is computed
    row: int = -1
    blocks: list[int] = field(default_factory=list, repr=False)
    computed: int = 0  # tokens with entries in the cache
    chain: int = 0  # serial of the last named block
    named: int = 0  # blocks named
    draft: list[int] = field(default_factory=list, repr=False)  # tokens guessed to come next

    @property
    def known(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens at those positions, drafts behind what is known."""
        border = len(self.prompt)
        if stop <= border:
            return self.prompt[start:stop]
        said = self.token_ids[max(start - border, 0) : stop - border]
        if stop > self.known:
            said = said + self.draft[: stop - self.known]
        return self.prompt[start:] + said if start < border else said

    def forced(self, closing: Sequence[int]) -> int | None:
        """The token that has to come next, because the thought has used up what it may: of those that close it."""
        budget = self.sampling.max_thinking_tokens
        if budget is None or self.transcript is None or not self.transcript.thinking:
            return None
        over = len(self.token_ids) - budget
        return closing[min(over, len(closing) - 1)] if over >= 0 else None

    def adjusted(self, logits_V: Tensor, closing: Sequence[int], produced: int) -> Tensor:
        """The logits [V] that bias, penalties, min_tokens and a used-up thought leave for token number `produced`; a copy, float32."""
        s, logits = self.sampling, logits_V.float().clone()
        said = np.array(self.token_ids, np.int64)
        if s.repetition_penalty != 1:
            ids = torch.from_numpy(np.unique(np.concatenate((np.array(self.prompt, np.int64), said)))).to(logits.device)
            found = logits[ids]
            logits[ids] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        if len(said) and (s.presence_penalty or s.frequency_penalty):
            unique, times = np.unique(said, return_counts=True)
            penalty = torch.from_numpy((s.presence_penalty + s.frequency_penalty * times).astype(np.float32))
            logits[torch.from_numpy(unique).to(logits.device)] -= penalty.to(logits.device)
        for token, bias in s.logit_bias:
            logits[token] += bias
        if produced < s.min_tokens:
            logits[sorted(self.stops)] = -torch.inf
        forced = self.forced(closing)
        if forced is not None:
            logits.fill_(-torch.inf)[forced] = 0.0
        return logits
