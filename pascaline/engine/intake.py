"""From a prompt and its settings to requests that can be answered, or to the sentence why they cannot."""

from typing import Any

import numpy as np

from pascaline.engine.request import Request
from pascaline.engine.sampler import Sampling, mix
from pascaline.engine.transcript import Transcript
from pascaline.errors import BadInput
from pascaline.model.config import ModelConfig
from pascaline.tokenizer import UNTHINK, Tokenizer

Prompt = str | list[int] | list[dict[str, Any]]  # a user's message, token ids, or a whole conversation


class Intake:
    """Checks prompts against the model, its vocabulary and the cache."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None, capacity: int, bytes_per_token: int):
        self.config, self.tokenizer, self.capacity, self.bytes_per_token = config, tokenizer, capacity, bytes_per_token
        self.closing = [] if tokenizer is None else tokenizer.encode(UNTHINK, special=True)  # what ends a thought

    def requests(self, prompt: Prompt, sampling: Sampling, index: int, salt: str = "") -> list[Request]:
        """The n requests of a prompt, each with a seed of its own from (sampling.seed, index of the prompt, 0..n-1). BadInput for what
        does not fit the context, the cache or the vocabulary."""
        ids, c = self._ids(prompt, sampling.thinking), self.config
        if not 0 < len(ids) < c.max_position_embeddings + (sampling.max_tokens == 0):
            raise BadInput(f"a prompt of {len(ids)} tokens does not fit: the context allows 1 to {c.max_position_embeddings - 1}.")
        named = [*ids, *sampling.stop_ids, *(token for token, _ in sampling.logit_bias)]
        if not 0 <= min(named) <= max(named) < c.vocab_size:
            raise BadInput(f"token ids from {min(named)} to {max(named)} are given, but the model's vocabulary has {c.vocab_size}.")
        limit = min(sampling.max_tokens, c.max_position_embeddings - len(ids))
        if len(ids) + limit > self.capacity:
            raise BadInput(
                f"a prompt of {len(ids)} tokens with {limit} to be said can never fit: the cache holds {self.capacity} tokens "
                f"of {self.bytes_per_token:,} bytes."
            )
        if self.tokenizer is None and (sampling.stop or sampling.max_thinking_tokens is not None):
            raise BadInput("stop strings and a budget of thinking need a tokenizer, which this engine has not.")
        key = mix(mix(np.array([sampling.seed], np.uint64)) + np.uint64(index))
        seeds = mix(key + np.arange(sampling.n, dtype=np.uint64)) >> np.uint64(1)
        stops = frozenset(self._stop_ids(sampling))
        group = [Request(ids, sampling, int(seed), i, salt, stops, limit=limit) for i, seed in enumerate(seeds)]
        for request in group:
            if self.tokenizer is not None and (sampling.stop or sampling.max_thinking_tokens is not None):
                request.transcript = Transcript(self.tokenizer, ids, sampling.stop, stops)
            request.prompt_logprobs, request.prompt_top = group[0].prompt_logprobs, group[0].prompt_top  # computed once
        return group

    def _ids(self, prompt: Prompt, thinking: bool) -> list[int]:
        if isinstance(prompt, list) and all(isinstance(t, int) for t in prompt):
            return prompt  # type: ignore[return-value]
        if self.tokenizer is None:
            raise BadInput("this engine has no tokenizer: give prompts as token ids.")
        return self.tokenizer.prompt_ids(prompt, thinking)  # type: ignore[arg-type]

    def _stop_ids(self, sampling: Sampling) -> list[int]:
        if sampling.ignore_eos:
            return list(sampling.stop_ids)
        own = self.config.eos_token_id
        ids = [*sampling.stop_ids, *(own if isinstance(own, list) else [] if own is None else [own])]
        if self.tokenizer is not None and self.tokenizer.template is not None:
            ids.append(self.tokenizer.end_of_turn)
        return ids
