"""Continuous batching on a paged cache: each step computes one token for every row that decodes, and a part of the prompts that wait.

The engine calls the trainer's own modules with the weights in memory, so an update of the model is an update of the engine.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pascaline.device import choose, free_memory
from pascaline.engine import cache
from pascaline.engine.blocks import BLOCK, Blocks
from pascaline.engine.cache import Batch, Store, batch_width, one_row_kernels
from pascaline.engine.intake import Intake, Prompt
from pascaline.engine.request import Output, Request, Top
from pascaline.engine.sampler import Sampling, draw
from pascaline.engine.scheduler import Scheduler
from pascaline.engine.speculate import Speculation
from pascaline.engine.stats import Stats
from pascaline.errors import BadInput
from pascaline.model import hf, native
from pascaline.model.transformer import Model
from pascaline.tokenizer import Tokenizer


class Engine:
    """engine.generate(["Make 12 from 6, 6, 13."], Sampling(n=4)) -> [[Output, ...]]; a server calls add, step and cancel, in one thread."""

    def __init__(
        self,
        model: Model | str | Path,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        max_rows: int = 1024,
        cache_memory: int | None = None,
        max_batch_tokens: int = 2048,
        prefix_reuse: bool = True,
        speculate: bool = False,
        record_routes: bool = False,
    ):
        """max_rows: answers that run at once. cache_memory: bytes of cache; None: what max_rows whole contexts need, but at most a quarter
        of the free memory. max_batch_tokens: of one step. speculate: with the MTP module, where it pays; that goes by the clock, so that
        log-probabilities may differ in their last digits from run to run. record_routes: every Output tells which experts were used."""
        if not isinstance(model, Model):
            tokenizer = tokenizer or Tokenizer.load(model)
            model = hf.load(model, dtype, choose(device))
        for name, value in (("max_rows", max_rows), ("max_batch_tokens", max_batch_tokens)):
            if value < 1:
                raise BadInput(f"{name} = {value}: an engine needs at least one.")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows = min(max_rows, max_batch_tokens)
        self.max_batch_tokens, self.prefix_reuse = max_batch_tokens, prefix_reuse
        self.speculation = Speculation(model) if speculate and model.config.num_nextn_predict_layers else None
        self._stats = Stats()
        self.paused = False
        self._store: Store | None = None
        self._record_routes = record_routes
        self._blocks = Blocks(self._total_blocks(cache_memory))
        self._intake = Intake(model.config, tokenizer, self.capacity, self.bytes_per_token())
        self.scheduler = Scheduler(self._blocks, self.max_rows, max_batch_tokens, prefix_reuse)
        self._weights = self._fingerprint()
        if model.device.type == "cpu":
            native.start()

    # ---- for a program -----------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None) -> list[list[Output]]:
        """For each prompt, sampling.n answers. The same seed gives the same answers whatever else is in the batch. Where each prompt has a
        sampling of its own, its seed counts, not its place. BadInput if a prompt leaves no room in the model's context."""
        if isinstance(prompts, str):
            raise BadInput("generate takes a list of prompts; put this one in brackets.")
        if self.model.device.type == "cpu" and not self.busy:
            native.wait()  # so that an answer does not hang on when the compiler was done
        self._look_at_weights()
        if sampling is None or isinstance(sampling, Sampling):
            groups = [self._intake.requests(prompt, sampling or Sampling(), index) for index, prompt in enumerate(prompts)]
        else:
            groups = [self._intake.requests(prompt, own, 0) for prompt, own in zip(prompts, sampling, strict=True)]
        for group in groups:
            self.scheduler.add(group)
        mine = [request for group in groups for request in group]
        try:
            for request in mine:
                while request.output is None:
                    self.step()
        finally:
            self._cancel_all(mine)
        return [[r.output for r in group if r.output is not None] for group in groups]

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[int]:
        """Token ids of one answer as they come."""
        self._look_at_weights()
        (request,) = self._intake.requests(prompt, sampling or Sampling(), 0)[:1]
        self.scheduler.add([request])
        sent = 0
        try:
            while request.output is None:
                self.step()
                yield from request.token_ids[sent:]
                sent = len(request.token_ids)
        finally:
            self._cancel_all([request])

    # ---- for a server ------------------------------------------------------------------------------------------------

    def add(self, prompt: Prompt, sampling: Sampling, salt: str = "") -> list[Request]:
        """Queue the n answers of a prompt. Prefixes are reused among requests of the same salt only. BadInput if it can never fit."""
        if not self.busy:
            self._look_at_weights()
        group = self._intake.requests(prompt, sampling, 0, salt)
        self.scheduler.add(group)
        return group

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def stats(self) -> Stats:
        """As of now."""
        s, scheduler = self._stats, self.scheduler
        s.preemptions, s.prefix_queries, s.prefix_hits = scheduler.preemptions, scheduler.queries, scheduler.hits
        s.prefilled, s.running, s.waiting = scheduler.prefilled, len(scheduler.running), scheduler.queued
        s.blocks, s.blocks_used = self._blocks.total - 1, self._blocks.used
        return s

    def cancel(self, request: Request) -> None:
        """End it now; its blocks are free when this returns. Nothing happens if it has ended."""
        if request.finish_reason is None:
            self.scheduler.drop(request)
            self._end(request, "cancelled")

    def pause(self) -> None:
        """From now on `step` does nothing; what runs stays as it is."""
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def flush(self) -> None:
        """Forget every prefix."""
        self._blocks.flush()

    @torch.no_grad()
    def update_weights(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Take over new weights in place, between steps: `state` by the names of model.state_dict(), or None if they were written into the
        model's tensors already. No entry of the old ones is read again: prefixes are forgotten, and answers that run go on with the new
        weights, on a cache computed anew. BadInput for a name or shape that the model has not."""
        own = self.model.state_dict()
        for name, tensor in (state or {}).items():
            if name not in own or own[name].shape != tensor.shape:
                raise BadInput(f"the new weights hold {name} {list(tensor.shape)}, which is not of this model.")
        for name, tensor in (state or {}).items():
            own[name].copy_(tensor)
        self._blocks.flush()
        for request in reversed(list(self.scheduler.running)):
            self.scheduler.preempt(request)
        self._weights = self._fingerprint()

    def release(self) -> None:
        """Give the cache's memory back until the next step; everything cached is forgotten."""
        self.update_weights()
        self._store = None

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return (self._blocks.total - 1) * BLOCK

    def bytes_per_token(self) -> int:
        """Bytes of cache that a token costs over all layers, the MTP module's among them while it drafts."""
        return cache.bytes_per_token(self.model.config, self.model.dtype, self._layers)

    # ---- one step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Compute one step's tokens; the requests that got some or ended. An error of the computation ends all that took part in it,
        and is raised."""
        if self.paused or not self.busy:
            return []
        if not self.scheduler.running and native.take():
            self.flush()  # what PyTorch computed has other bits
        began, plan = time.perf_counter(), self.scheduler.plan()
        before = self._stats.generated
        drafted = any(request.draft for request, _ in plan)
        decoding = all(count == 1 + len(request.draft) for request, count in plan)
        try:
            touched = self._compute(plan)
        except BaseException:
            self.flush()  # blocks may have names that hold nothing
            for request, _ in plan:
                if request.output is None:
                    self._end(request, "error", "the computation of this answer failed")
            raise
        seconds = time.perf_counter() - began
        if self.speculation is not None and decoding and plan:
            self.speculation.timed(batch_width(len(plan)), max(self._stats.generated - before, 1), seconds, drafted)
        self._stats.steps, self._stats.step_seconds = self._stats.steps + 1, seconds
        return touched

    def _compute(self, plan: list[tuple[Request, int]]) -> list[Request]:
        store = self._storage()
        for old, new in self.scheduler.copies:
            store.copy(old, new)
        batch, tokens_n = self._batch(store, plan)
        with one_row_kernels(len(tokens_n)):
            hidden, _ = self.model.hidden(tokens_n[None], batch.position_n[None], cache=batch)
            self._prompt_logprobs(plan, batch, hidden[0])
            places = self._places(plan, batch)
            if places:
                which = [at for _, at, _ in places]
                said = hidden[0] if which == list(range(len(tokens_n))) else hidden[0, which]
                logits = self.model.head(said, batch).float()
                self._deliver(places, *self._sampled(logits, places))
            if self.speculation is not None and self.speculation.pays(batch_width(len(self.scheduler.running) or 1)):
                self.speculation.draft(batch, hidden, plan)
            else:
                for request, _ in plan:
                    request.draft = []
        return list(dict.fromkeys([*(r for r, _, _ in places), *(r for r, _ in plan if r.output is not None)]))

    def _batch(self, store: Store, plan: list[tuple[Request, int]]) -> tuple[Batch, Tensor]:
        ids = [t for request, count in plan for t in request.tokens(request.computed, request.computed + count)]
        idle = 0 if native.library() else batch_width(len(ids)) - len(ids)  # rows that write to block 0
        tables = np.zeros((len(plan) + idle, self.scheduler.tables.shape[1]), np.int32)
        tables[: len(plan)] = self.scheduler.tables[[request.row for request, _ in plan]]
        starts, counts = [request.computed for request, _ in plan], [count for _, count in plan]
        batch = Batch(store.pool, tables, starts + [0] * idle, counts + [1] * idle, store.routes)
        return batch, torch.tensor(ids + [0] * idle, device=store.pool.device)

    def _places(self, plan: list[tuple[Request, int]], batch: Batch) -> list[tuple[Request, int, int]]:
        """Who gets a token: the request, whose logits (an index among the step's tokens), and after how many guesses."""
        places = []
        for (request, count), offset in zip(plan, batch.offsets.tolist(), strict=False):
            request.computed += count - len(request.draft)
            if request.computed < request.known:
                continue
            last = offset + count - 1 - len(request.draft)
            for one in [request, *self.scheduler.fork(request)]:
                if one.limit == 0:
                    self._end(one, "length")
                else:
                    places += [(one, last + guess, guess) for guess in range(1 + len(one.draft))]
        return places

    def _sampled(self, logits: Tensor, places: list[tuple[Request, int, int]]) -> tuple[list[int], list[float], list[bool], list[Top]]:
        """For each place: the token, the model's own log-probability of it, whether the logits are numbers, the likeliest tokens."""
        adjusted = logits
        for i, (request, _, guess) in enumerate(places):
            s = request.sampling
            produced = len(request.token_ids) + guess
            if s.by_history or s.logit_bias or produced < s.min_tokens:
                adjusted = adjusted.clone() if adjusted is logits else adjusted
                adjusted[i] = request.adjusted(logits[i], self._intake.closing, produced)
        seeds = np.array([request.seed for request, _, _ in places], np.uint64)
        positions = np.array([len(request.token_ids) + guess for request, _, guess in places])
        tokens, logprobs = draw(adjusted, logits, [request.sampling for request, _, _ in places], seeds, positions)
        tops: list[Top] = [[] for _ in places]
        wanted = [i for i, (request, _, _) in enumerate(places) if request.sampling.top_logprobs]
        if wanted:
            most = max(places[i][0].sampling.top_logprobs for i in wanted)
            for i, top in zip(wanted, _tops(logits[wanted].log_softmax(-1), most), strict=True):
                tops[i] = top[: places[i][0].sampling.top_logprobs]
        said = logprobs.tolist()
        return tokens.tolist(), said, [math.isfinite(p) for p in said], tops

    def _deliver(
        self, places: list[tuple[Request, int, int]], tokens: list[int], logprobs: list[float], finite: list[bool], tops: list[Top]
    ) -> None:
        """Append the tokens, as far as the guesses before them were right, and end what has ended."""
        now = time.monotonic()
        for (request, _, guess), token, logprob, fine, top in zip(places, tokens, logprobs, finite, tops, strict=True):
            if request.output is not None or guess > len(request.draft):
                continue
            if not fine:
                self._poisoned(request)
                continue
            request.token_ids.append(token)
            request.logprobs.append(logprob)
            if request.sampling.top_logprobs:
                request.top_logprobs.append(top)
            request.first_token = request.first_token or now
            self._stats.generated += 1
            if guess < len(request.draft):
                self._stats.drafts += guess == 0
                self._stats.draft_tokens += 1
                if request.draft[guess] == token:
                    self._stats.accepted_tokens += 1
                    request.computed += 1
                else:
                    request.draft = request.draft[:guess]
            self._check_end(request, token)

    def _check_end(self, request: Request, token: int) -> None:
        said = len(request.token_ids)
        if request.transcript is not None:
            request.transcript.feed([token])
        stopped = request.transcript is not None and request.transcript.stopped is not None
        if (token in request.stops or stopped) and said > request.sampling.min_tokens - 1:
            self._end(request, "stop")
        elif said >= request.limit:
            self._end(request, "length")
        elif request.computed // BLOCK > request.named:
            self.scheduler.name(request, request.computed)

    def _prompt_logprobs(self, plan: list[tuple[Request, int]], batch: Batch, hidden_nD: Tensor) -> None:
        for (request, count), offset in zip(plan, batch.offsets.tolist(), strict=False):
            done = len(request.prompt_logprobs)
            if not request.sampling.prompt_logprobs or done == len(request.prompt):
                continue
            following = request.prompt[request.computed + 1 : request.computed + 1 + count]
            if not done:
                request.prompt_logprobs.append(None)
                request.prompt_top.append([])
            if following:
                log_p = self.model.head(hidden_nD[offset : offset + len(following)], batch).float().log_softmax(-1)
                request.prompt_logprobs += log_p.gather(1, torch.tensor(following, device=log_p.device)[:, None])[:, 0].tolist()
                request.prompt_top += _tops(log_p, request.sampling.top_logprobs)

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _end(self, request: Request, reason: str, error: str | None = None) -> None:
        routes = None
        if request.row >= 0:
            routes = self._storage().routed(request.blocks, min(request.computed, request.known - 1), request.known)
            self.scheduler.name(request, request.computed)
            self.scheduler.leave(request)
        request.finish_reason, request.error, request.finished = reason, error, time.monotonic()
        ids = request.token_ids
        out = Output(ids, request.logprobs, reason, top_logprobs=request.top_logprobs, routes=routes)
        if request.transcript is not None:
            request.transcript.finish()
            out.reasoning, out.text = request.transcript.reasoning, request.transcript.text
        elif self.tokenizer is not None:
            said = ids[:-1] if reason == "stop" else ids
            out.reasoning, text = self.tokenizer.thought(request.prompt, said)
            out.text = text or ""
        request.output = out

    def _poisoned(self, request: Request) -> None:
        """Its logits are no numbers: it ends alone, and what it left in the cache is wiped and never read."""
        blocks = list(request.blocks)
        self._blocks.forget(blocks)
        request.named = len(blocks)
        self._end(request, "error", "the model gave no numbers for this answer")
        self._storage().pool[:, [b for b in blocks if not self._blocks.references[b]]] = 0.0

    def _cancel_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.cancel(request)

    # ---- memory and weights ------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> int:
        return self.model.config.num_hidden_layers + (self.speculation is not None)

    def _total_blocks(self, memory: int | None) -> int:
        block = BLOCK * self.bytes_per_token()
        if memory is None:
            contexts = self.max_rows * -(-self.model.config.max_position_embeddings // BLOCK)
            return 1 + max(min(contexts, free_memory(self.model.device) // 4 // block), 1)
        if memory < 2 * block:
            raise BadInput(f"cache_memory = {memory:,} bytes is too little: the smallest cache, of {BLOCK} tokens, takes {2 * block:,}.")
        return memory // block

    def _storage(self) -> Store:
        if self._store is None:
            m, total = self.model, self._blocks.total
            self._store = Store(m.config, self._layers, total, m.dtype, m.device, self._record_routes)
        return self._store

    def _fingerprint(self) -> int:
        """Changes when a weight is written to or replaced (but for writes that autograd does not see: say update_weights)."""
        tensors = self.model.state_dict(keep_vars=True).values()
        return hash(tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors))

    def _look_at_weights(self) -> None:
        if self._fingerprint() != self._weights:
            self.update_weights()


def _tops(log_p_nV: Tensor, most: int) -> list[Top]:
    values, ids = log_p_nV.topk(min(most, log_p_nV.shape[1]), -1)
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
