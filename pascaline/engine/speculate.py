"""Self-speculation (arXiv 2412.19437, section 5.4.3): the MTP module guesses the token after next, and the next step computes both.

The guess is drawn by the same race as the model's own token (sampler.py), and it stands only if the model draws that very token: what is
said is what would have been said without it, whatever the guesses are worth.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pascaline.engine.cache import Batch
from pascaline.engine.request import Request
from pascaline.engine.sampler import sample
from pascaline.model.transformer import Model, MTPBlock

TRIED, PLAIN = 12, 4  # steps with and without, before the two are compared
AGAIN = 512  # steps after which the slower one is tried again
KEPT = 0.9  # of an average, each step


class Speculation:
    """Drafts, and whether they pay: for each number of rows the two ways are timed in turn, and the faster one goes on."""

    def __init__(self, model: Model):
        self.module = cast(MTPBlock, model.model.layers[model.config.num_hidden_layers])
        self.model = model
        self.steps: dict[int, int] = {}  # by rows
        self.seconds: dict[tuple[int, bool], float] = {}  # of a token, by rows and whether it was with drafts; averages

    def pays(self, rows: int) -> bool:
        """Whether to draft for a step of so many rows."""
        at = self.steps.get(rows, 0)
        if at % AGAIN < TRIED + PLAIN:
            return at % AGAIN < TRIED
        return self.seconds.get((rows, True), 0.0) <= self.seconds.get((rows, False), float("inf"))

    def timed(self, rows: int, tokens: int, seconds: float, drafted: bool) -> None:
        """A step in which every row decoded: how long it took, and how many tokens it gave."""
        self.steps[rows] = self.steps.get(rows, 0) + 1
        before = self.seconds.get((rows, drafted), seconds / tokens)
        self.seconds[rows, drafted] = KEPT * before + (1 - KEPT) * seconds / tokens

    def draft(self, batch: Batch, hidden_1nD: Tensor, plan: Sequence[tuple[Request, int]]) -> None:
        """Give each request of the step that goes on a guess of its next token; request.computed is its length without the last token."""
        n = hidden_1nD.shape[1]
        following, places, drafting = [], [], []
        for i, (request, count) in enumerate(plan):
            start = int(batch.starts[i])
            known = request.tokens(start + 1, min(start + 1 + count, request.known))
            following += known + [0] * (count - len(known))  # what comes after a guess that was wrong is of no use
            if self._drafts(request):
                places.append(int(batch.offsets[i]) + request.computed - 1 - start)
                drafting.append(request)
        tokens = torch.tensor([following + [0] * (n - len(following))], device=hidden_1nD.device)
        view = self.model.view(tokens, batch.position_n[None], None, batch)
        states, _ = self.module(hidden_1nD, view, self.model.model.embed_tokens(tokens))
        if drafting:
            seeds, positions = np.array([r.seed for r in drafting], np.uint64), np.array([len(r.token_ids) for r in drafting])
            guesses = sample(self.model.head(states[0, places], batch), [r.sampling for r in drafting], seeds, positions)
            for request, guess in zip(drafting, guesses.tolist(), strict=True):
                request.draft = [guess]

    def _drafts(self, request: Request) -> bool:
        s = request.sampling
        ready = request.row >= 0 and request.known - request.computed == 1 and request.limit - len(request.token_ids) > 1
        return ready and not s.by_history
