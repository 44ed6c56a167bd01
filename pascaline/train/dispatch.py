"""Expert parallelism: ranks that share out the experts of a layer send each other the tokens and get back what the experts made of them.

Shapes: n tokens of this rank, R ranks, K experts a token, D hidden; s (token, rank) rows that this rank sends, m rows that it is sent,
p (row, expert) pairs among them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Dispatch:
    """For a layer whose experts are dealt out in order, `each` to every rank of `group`. All its ranks must call as often.

    A token goes once to each rank that holds any of its experts, and one row, the sum over them, comes back. Where the groups of
    group-limited routing lie on ranks, that is at most topk_group ranks (DeepSeek-V3, arXiv 2412.19437 section 2.1.2).
    """

    def __init__(self, group: Any, each: int):
        self.group, self.size, self.each = group, dist.get_world_size(group), each
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext  # what a wait for the other ranks runs in

    @torch.compiler.disable  # other sizes each time, and the host must know them
    def __call__(self, here: Callable[..., Tensor], x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, [n, D]. here: computes it for experts of this rank, by their number on it."""
        rank_nK = index_nK // self.each
        need_nR = torch.zeros(len(x_nD), self.size, dtype=torch.bool, device=x_nD.device).scatter_(1, rank_nK, True)
        rank_s, token_s = need_nR.t().nonzero(as_tuple=True)
        sent, got = self._counts(need_nR.sum(0))
        held_sK = rank_nK[token_s] == rank_s.unsqueeze(1)
        index_sK = torch.where(held_sK, index_nK[token_s] % self.each, -1)
        weight_sK = torch.where(held_sK, weight_nK.index_select(0, token_s), 0.0)
        x_mD = self._move(x_nD.index_select(0, token_s), sent, got)
        weight_mK, index_mK = self._move(torch.cat((weight_sK, index_sK.float()), 1), sent, got).chunk(2, 1)  # exact up to 2^24
        pair_p = (index_mK.flatten() >= 0).nonzero().squeeze(1)
        row_p = pair_p // index_nK.shape[1]
        weight_p1, index_p1 = (each.flatten().index_select(0, pair_p).unsqueeze(1) for each in (weight_mK, index_mK))
        y_pD = here(x_mD.index_select(0, row_p), weight_p1, index_p1.long())
        y_sD = self._move(torch.zeros_like(x_mD).index_add(0, row_p, y_pD), got, sent)
        return torch.zeros_like(x_nD).index_add(0, token_s, y_sD)

    def _counts(self, sent_R: Tensor) -> tuple[list[int], list[int]]:
        """How many rows go to each rank and come from it: the host must know."""
        got_R = torch.empty_like(sent_R)
        with self.waiting():
            dist.all_to_all_single(got_R, sent_R, group=self.group)
        sent, got = torch.stack((sent_R, got_R)).tolist()
        return sent, got

    def _move(self, rows: Tensor, sent: list[int], got: list[int]) -> Tensor:
        return _Move.apply(rows, sent, got, self.group, self.waiting)


class _Move(torch.autograd.Function):
    """Rows in the order of the ranks that they are for -> rows in the order of the ranks that they come from; gradients go back."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, sent: list[int], got: list[int], group: Any, waiting: Callable[[], AbstractContextManager[None]]
    ) -> Tensor:
        ctx.way = (got, sent, group, waiting)
        out = rows.new_empty(sum(got), rows.shape[1])
        with waiting():
            dist.all_to_all_single(out, rows.contiguous(), got, sent, group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return _Move.apply(grad, *ctx.way), None, None, None, None
