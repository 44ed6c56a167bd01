"""Who computes how many tokens in the next step, and on which blocks.

Rows that decode go first, with one token each (and their drafts); what is left of the step's budget goes to prompts, in chunks. When
blocks run out, the request that came last gives its own back and computes its tokens again later.
"""

import time
from bisect import insort
from collections import deque
from itertools import count

import numpy as np

from pascaline.engine.blocks import BLOCK, Blocks
from pascaline.engine.request import Request


class Scheduler:
    """Requests that wait and run. A running one has a row of the block table and computes `known - computed` tokens before its next."""

    def __init__(self, blocks: Blocks, rows: int, budget: int, reuse: bool):
        self.blocks, self.budget, self.reuse = blocks, budget, reuse
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of arrival
        self.tables = np.zeros((rows, 8), np.int32)
        self.free_rows = list(reversed(range(rows)))
        self.copies: list[tuple[int, int]] = []  # blocks to be copied before the step: (from, to)
        self.preemptions = self.queries = self.hits = self.prefilled = 0
        self._numbers = count(1)

    def add(self, group: list[Request]) -> None:
        """Queue the answers of one prompt, which is computed once."""
        for request in group:
            request.number = next(self._numbers)
        group[0].forks = group[1:]
        self.waiting.append(group[0])

    def plan(self) -> list[tuple[Request, int]]:
        """The next step: requests and how many tokens of each. At most `budget` tokens in all."""
        self.copies = []
        plan: list[tuple[Request, int]] = []
        left = self.budget - len(self.running)
        for request in list(self.running):  # the eldest first; a younger one may lose its row to it
            if request.row >= 0 and request.known - request.computed == 1:
                if left < len(request.draft):
                    request.draft = []
                if self._grow(request, 1 + len(request.draft)):
                    plan.append((request, 1 + len(request.draft)))
                    left -= len(request.draft)
        left = self.budget - sum(tokens for _, tokens in plan)
        for request in [r for r in self.running if r.known - r.computed > 1]:
            left -= self._chunk(request, left, plan)
        while self.waiting and left > 0 and self.free_rows and self._admit(self.waiting[0]):
            left -= self._chunk(self.waiting.popleft(), left, plan)
        return plan

    def _chunk(self, request: Request, left: int, plan: list[tuple[Request, int]]) -> int:
        """Give a prompt its share: everything if it fits, else half of what is left, so that a long one does not keep others out."""
        wanted = request.known - request.computed
        tokens = wanted if wanted <= left // 2 or not self.waiting else -(-left // 2)
        tokens = min(tokens, wanted, left)
        if tokens > 0:
            plan.append((request, tokens))
            self.prefilled += tokens
            # Named before they are computed: within a step all entries are stored before any is read.
            self.name(request, request.computed + tokens)
        return max(tokens, 0)

    def _admit(self, request: Request) -> bool:
        """A row and blocks for all its tokens, if there are enough and one more for everybody who runs."""
        found: list[int] = []
        root = self.blocks.root(request.salt)
        if self.reuse and not request.sampling.prompt_logprobs:
            found = self.blocks.find(request.tokens(0, request.known), root)
        self.blocks.share(found)
        missing = -(-request.known // BLOCK) - len(found)
        if missing + len(self.running) > self.blocks.available:
            self.blocks.release(found)
            return False
        request.blocks = found + [self.blocks.take() for _ in range(missing)]
        request.computed, request.named = len(found) * BLOCK, len(found)
        request.chain = self.blocks.serial(found[-1]) if found else root
        if not request.token_ids:
            request.cached_tokens = request.computed
            self.queries, self.hits = self.queries + len(request.prompt), self.hits + request.computed
        self._seat(request)
        return True

    def _seat(self, request: Request) -> None:
        request.row = self.free_rows.pop()
        insort(self.running, request, key=lambda r: r.number)
        request.scheduled = request.scheduled or time.monotonic()
        self._write(request, 0)

    def _write(self, request: Request, first: int) -> None:
        """The request's blocks from the first-th on, into its row of the table."""
        width = self.tables.shape[1]
        if len(request.blocks) > width:
            more = max(len(request.blocks), 2 * width) - width
            self.tables = np.pad(self.tables, ((0, 0), (0, more)))
        self.tables[request.row, first : len(request.blocks)] = request.blocks[first:]

    def _grow(self, request: Request, tokens: int) -> bool:
        """Blocks for its next tokens, none of them shared; False if it had to give up its row."""
        at = request.computed // BLOCK
        if at < len(request.blocks) and self.blocks.references[request.blocks[at]] > 1:  # copy on write
            if not self._room(request):
                return False
            old, new = request.blocks[at], self.blocks.take()
            self.copies.append((old, new))
            request.blocks[at] = new
            self.blocks.release([old])
            self._write(request, at)
        first = len(request.blocks)
        while len(request.blocks) * BLOCK < request.computed + tokens:
            if not self._room(request):
                return False
            request.blocks.append(self.blocks.take())
        if len(request.blocks) > first:
            self._write(request, first)
        return True

    def _room(self, request: Request) -> bool:
        """Make a block free, at the expense of the youngest; False if that is the request itself."""
        while not self.blocks.available:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is request:
                return False
        return True

    def preempt(self, request: Request) -> None:
        """Back to the head of the queue; its tokens stay, their entries are computed again."""
        self.preemptions += 1
        self.leave(request)
        self.waiting.appendleft(request)

    def leave(self, request: Request) -> None:
        """Give back its row and its blocks."""
        self.running.remove(request)
        self.blocks.release(request.blocks)
        self.free_rows.append(request.row)
        request.row, request.blocks, request.computed, request.named, request.draft = -1, [], 0, 0, []

    def fork(self, request: Request) -> list[Request]:
        """Its prompt is computed: those that wait for it, as far as there are rows, share its blocks; the others queue as a group."""
        seats = len(self.free_rows)
        forked, waiting, request.forks = request.forks[:seats], request.forks[seats:], []
        for other in forked:
            self.blocks.share(request.blocks)
            other.blocks, other.computed = list(request.blocks), request.computed
            other.named, other.chain, other.cached_tokens = request.named, request.chain, request.cached_tokens
            self._seat(other)
        if waiting:
            waiting[0].forks = waiting[1:]
            self.waiting.appendleft(waiting[0])
        return forked

    @property
    def queued(self) -> int:
        """Answers that have no row."""
        return sum(1 + len(r.forks) for r in self.waiting) + sum(len(r.forks) for r in self.running)

    def name(self, request: Request, upto: int) -> None:
        """Make its full blocks below position `upto` known."""
        while self.reuse and (request.named + 1) * BLOCK <= upto:
            start = request.named * BLOCK
            request.chain = self.blocks.name(request.blocks[request.named], request.chain, request.tokens(start, start + BLOCK))
            request.named += 1

    def drop(self, request: Request) -> None:
        """Take it out, wherever it is; one of those that waited for its prompt takes its place."""
        heir = request.forks[0] if request.forks else None
        if heir is not None:
            heir.forks, request.forks = request.forks[1:], []
        if request.row >= 0:
            self.leave(request)
            if heir is not None:
                self.waiting.appendleft(heir)
        elif request in self.waiting:
            at = self.waiting.index(request)
            del self.waiting[at]
            if heir is not None:
                self.waiting.insert(at, heir)
        else:
            for other in [*self.waiting, *self.running]:
                if request in other.forks:
                    other.forks.remove(request)
