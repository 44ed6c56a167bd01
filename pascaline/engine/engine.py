"""Batched generation on a cache: rows that finish make room for prompts that wait.

The engine calls the trainer's own modules with the weights in memory, so an update of the model is an update of the engine.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pascaline.device import choose
from pascaline.engine.cache import PrefillCache, TokenCache
from pascaline.engine.sampler import Sampling, mix, sample, uniforms
from pascaline.errors import BadInput
from pascaline.model import hf
from pascaline.model.transformer import Model
from pascaline.tokenizer import Tokenizer

Prompt = str | list[int] | list[dict[str, Any]]  # a user's message, token ids, or a whole conversation
PREFILL_TOKENS = 16384  # padded prompt tokens in one prefill forward


@dataclass
class Output:
    """One answer. reasoning is what stands before </think>, text what stands after (Tokenizer.thought); a thought that was never closed
    leaves text empty. finish_reason: "stop" (an end token) or "length". logprobs are the model's own, one a token."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str = ""
    reasoning: str | None = None


@dataclass
class Request:
    """One answer to be sampled."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    output: Output | None = None
    row: int = field(default=-1, repr=False)


def batch_width(rows: int, capacity: int) -> int:
    """Rows to compute for `rows` active ones: a power of two up to 32, then a multiple of 32. The rest idle.

    Matmul kernels are made for a shape at its first use (a tenth of a second a decode step in bf16 on the CPU), and a shrinking batch
    would bring a new shape every step.
    """
    width = 1 << (rows - 1).bit_length() if rows <= 32 else -(-rows // 32) * 32
    return min(width, capacity)


@contextmanager
def one_row_kernels(rows: int) -> Iterator[None]:
    """For one row PyTorch's own matrix-vector product: oneDNN, its first choice for bf16 on the CPU, repacks the weights every time."""
    before = bool(torch.backends.mkldnn.enabled)
    torch.backends.mkldnn.enabled = before and rows > 1  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before  # type: ignore[assignment]


class Engine:
    """engine.generate(["Make 12 from 6, 6, 13."], Sampling(n=4)) -> [[Output, ...]]"""

    cache: TokenCache  # it and the arrays exist while rows run; entry i of each belongs to rows[i]
    tokens: np.ndarray
    logprobs: np.ndarray
    produced: np.ndarray
    limit: np.ndarray
    context: np.ndarray
    seeds: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    stop: np.ndarray

    def __init__(
        self,
        model: Model | str | Path,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        max_rows: int = 1024,
    ):
        if not isinstance(model, Model):
            tokenizer = tokenizer or Tokenizer.load(model)
            model = hf.load(model, dtype, choose(device))
        if max_rows < 1:
            raise BadInput(f"max_rows = {max_rows}: an engine needs at least one row.")
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.waiting: deque[Request] = deque()
        self.rows: list[Request] = []
        self.generated = self.prefilled = 0  # tokens, over the engine's life

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None) -> list[list[Output]]:
        """For each prompt, sampling.n answers. The same seed gives the same answers whatever else is in the batch (up to the
        rounding of matmuls of another shape). BadInput if a prompt leaves no room in the model's context."""
        if isinstance(prompts, str):
            raise BadInput("generate takes a list of prompts; put this one in brackets.")
        sampling = sampling or Sampling()
        requests = [self.requests(prompt, sampling, index) for index, prompt in enumerate(prompts)]
        self.waiting.extend(r for group in requests for r in group)
        try:
            while self.step():
                pass
        finally:
            self.reset()
        return [[r.output for r in group if r.output is not None] for group in requests]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[int]:
        """Token ids of one answer as they come."""
        (request,) = self.requests(prompt, sampling or Sampling(), 0)[:1]
        self.waiting.append(request)
        try:
            sent = 0
            while self.step():
                if request.row >= 0:
                    yield from self.tokens[request.row, sent : self.produced[request.row]].tolist()
                    sent = int(self.produced[request.row])
            assert request.output is not None
            yield from request.output.token_ids[sent:]
        finally:
            self.reset()

    def requests(self, prompt: Prompt, sampling: Sampling, index: int) -> list[Request]:
        """The n requests of a prompt, each with a seed of its own from (sampling.seed, index of the prompt, 0..n-1)."""
        ids, c = self._ids(prompt), self.model.config
        if not 0 < len(ids) < c.max_position_embeddings:
            raise BadInput(f"a prompt of {len(ids)} tokens does not fit: the context allows 1 to {c.max_position_embeddings - 1}.")
        if not 0 <= min(ids) <= max(ids) < c.vocab_size:
            raise BadInput(f"a prompt holds token ids from {min(ids)} to {max(ids)}, but the model's vocabulary has {c.vocab_size}.")
        key = mix(mix(np.array([sampling.seed], np.uint64)) + np.uint64(index))
        seeds = mix(key + np.arange(sampling.n, dtype=np.uint64)) >> np.uint64(1)
        return [Request(ids, sampling, int(seed)) for seed in seeds]

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list) and all(isinstance(t, int) for t in prompt):
            return prompt  # type: ignore[return-value]
        if self.tokenizer is None:
            raise BadInput("this engine has no tokenizer: give prompts as token ids.")
        return self.tokenizer.prompt_ids(prompt)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Forget everything that waits or runs, and free the cache."""
        self.waiting.clear()
        self.rows.clear()
        vars(self).pop("cache", None)

    @torch.inference_mode()
    def step(self) -> bool:
        """Admit waiting prompts or decode one token for every running row; False when nothing is left."""
        if self.waiting and (not self.rows or len(self.rows) < len(self.produced)):
            self._admit()
        elif self.rows:
            self._decode()
        return bool(self.rows or self.waiting)

    def _admit(self) -> None:
        """Prefill as many waiting requests as fit; requests with the same prompt share one forward."""
        if not self.rows:
            self._allocate()
        taken: list[Request] = []
        unique: dict[tuple[int, ...], int] = {}
        longest = 0
        while self.waiting and len(self.rows) + len(taken) < len(self.produced):
            prompt = tuple(self.waiting[0].prompt)
            longest = max(longest, len(prompt))
            if prompt not in unique and unique and (len(unique) + 1) * longest > PREFILL_TOKENS:
                break
            unique.setdefault(prompt, len(unique))
            taken.append(self.waiting.popleft())
        lengths = torch.tensor([len(p) for p in unique])
        tokens = torch.zeros(len(unique), int(lengths.max()), dtype=torch.long)
        for i, prompt in enumerate(unique):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
        device = self.model.device
        prefill = PrefillCache()
        hidden, _ = self.model.hidden(tokens.to(device), cache=prefill)
        logits = self.model.head(hidden[torch.arange(len(unique)), lengths.to(device) - 1])
        which = torch.tensor([unique[tuple(r.prompt)] for r in taken])
        first = len(self.rows)
        rows = torch.arange(first, first + len(taken))
        self.cache.put(rows.to(device), which.to(device), prefill, lengths[which].to(device))
        for row, request in enumerate(taken, first):
            request.row = row
            s = request.sampling
            room = self.model.config.max_position_embeddings - len(request.prompt)
            self.produced[row], self.limit[row], self.seeds[row] = 0, min(s.max_tokens, room), request.seed
            self.context[row], self.temperature[row], self.top_p[row] = len(request.prompt), s.temperature, s.top_p
            self.stop[row] = self._stop_ids(s)
        self.rows += taken
        self.prefilled += int(lengths.sum())
        self._take(logits.index_select(0, which.to(device)), first)

    def _decode(self) -> None:
        n = len(self.rows)
        width = batch_width(n, len(self.produced))
        self.cache.begin(width, int(self.context[:n].max()))
        last = self.tokens[np.arange(width), self.produced[:width] - 1]
        tokens = torch.from_numpy(last).to(self.model.device).unsqueeze(1)
        with one_row_kernels(width):
            hidden, _ = self.model.hidden(tokens, self.cache.lengths[:width].unsqueeze(1), cache=self.cache)
            logits = self.model.head(hidden[:, 0])[:n]
        self.cache.advance(n)
        self.context[:n] += 1
        self._take(logits, 0)

    def _take(self, logits: Tensor, first: int) -> None:
        """Sample the next token of rows first.. and retire the rows that end."""
        n = len(self.rows)
        span = slice(first, n)
        uniform = uniforms(self.seeds[span], self.produced[span])
        token, logprob = (t.cpu().numpy() for t in sample(logits, self.temperature[span], self.top_p[span], uniform))
        if int(self.produced[span].max(initial=0)) == self.tokens.shape[1]:
            self.tokens = np.concatenate((self.tokens, np.zeros_like(self.tokens)), 1)
            self.logprobs = np.concatenate((self.logprobs, np.zeros_like(self.logprobs)), 1)
        at = np.arange(first, n), self.produced[span]
        self.tokens[at], self.logprobs[at] = token, logprob
        self.produced[span] += 1
        self.generated += len(token)
        stopped = (self.stop[span] == token[:, None]).any(1)
        ended = np.flatnonzero(stopped | (self.produced[span] >= self.limit[span])) + first
        if len(ended):
            self._retire(ended, stopped[ended - first])

    def _retire(self, ended: np.ndarray, stopped: np.ndarray) -> None:
        for row, stop in zip(ended.tolist(), stopped.tolist(), strict=True):
            said = self.tokens[row, : self.produced[row]].tolist(), self.logprobs[row, : self.produced[row]].tolist()
            self.rows[row].output = self._output(self.rows[row], *said, stop)
            self.rows[row].row = -1
        gone, n = set(ended.tolist()), len(self.rows)
        left = n - len(gone)
        holes = [row for row in ended.tolist() if row < left]
        movers = [row for row in range(left, n) if row not in gone]
        if holes:
            self.cache.move(torch.tensor(movers).to(self.model.device), torch.tensor(holes).to(self.model.device))
            for array in (self.tokens, self.logprobs, self.produced, self.limit, self.seeds):
                array[holes] = array[movers]
            for array in (self.context, self.temperature, self.top_p, self.stop):
                array[holes] = array[movers]
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
                self.rows[hole].row = hole
        self.cache.release(left, n)
        del self.rows[left:]

    def _output(self, request: Request, ids: list[int], logprobs: list[float], stopped: bool) -> Output:
        out = Output(ids, logprobs, "stop" if stopped else "length")
        if self.tokenizer is not None:
            out.reasoning, text = self.tokenizer.thought(request.prompt, ids[:-1] if stopped else ids)
            out.text = text or ""
        return out

    def _stop_ids(self, sampling: Sampling) -> list[int]:
        own = self.model.config.eos_token_id
        ids = [*sampling.stop_ids, *(own if isinstance(own, list) else [] if own is None else [own])]
        if self.tokenizer is not None and self.tokenizer.template is not None:
            ids.append(self.tokenizer.end_of_turn)
        if len(ids) > self.stop.shape[1]:
            self.stop = np.pad(self.stop, ((0, 0), (0, len(ids) - self.stop.shape[1])), constant_values=-1)
        return ids + [-1] * (self.stop.shape[1] - len(ids))

    def _allocate(self) -> None:
        rows = min(self.max_rows, len(self.waiting))
        self.cache = TokenCache(self.model.config, rows, self.model.dtype, self.model.device)
        self.tokens, self.logprobs = np.zeros((rows, 64), np.int64), np.zeros((rows, 64), np.float32)
        self.produced, self.limit, self.context, self.seeds = (np.zeros(rows, np.int64) for _ in range(4))
        self.temperature, self.top_p = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        self.stop = np.full((rows, 1), -1, np.int64)
