"""Sigmoid router with group limits and bias balancing, and the experts behind it (DeepSeek-V3, arXiv 2412.19437 section 2.1.2).

Shapes: n tokens, D hidden, E experts, K experts a token, F expert width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pascaline.model.config import ModelConfig

SEGMENT = 32  # rows; an expert's share is rounded up to a multiple of it
FEW = 64  # (token, k) pairs an expert, up to which one batched matmul beats one for each expert


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int, bias: bool = False):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Routing(NamedTuple):
    """What a router did: its logits [n, E] (float32, with gradient) and the experts that were used [n, K], which it chose itself, or
    which were given to it; then `own` [n, K] are those that it would have chosen."""

    logits: Tensor
    chosen: Tensor
    own: Tensor | None = None

    def load(self, real: Tensor | None = None) -> Tensor:
        """How many (token, k) pairs each expert got, [E]; only tokens where `real` (n of them) holds count."""
        one = torch.ones_like(self.chosen) if real is None else real.view(-1, 1).long().expand_as(self.chosen)
        return one.new_zeros(self.logits.shape[-1]).scatter_add_(0, self.chosen.flatten(), one.flatten())  # no wait for the device

    def differs(self, chosen_nK: Tensor) -> Tensor:
        """Where, [n], the router's own choice is another set of experts than these; not where they are free (E)."""
        own = self.chosen if self.own is None else self.own
        return (own.sort(-1).values != chosen_nK.sort(-1).values).any(-1) & (chosen_nK < self.logits.shape[-1]).all(-1)


class Router(nn.Module):
    """Scores every expert in float32 and picks K. The bias steers the choice only; it is moved by `balance`, never by a gradient."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_nD: Tensor, given_nK: Tensor | None = None) -> tuple[Tensor, Routing]:
        """[n, D] -> weights [n, K] float32, and what was chosen. given_nK: the experts to use in place of its choice (router replay,
        arXiv 2510.11370), E where it is free; their weights come from the scores all the same."""
        c = self.config
        logits_nE = F.linear(x_nD.float(), self.weight.float())
        scores_nE = logits_nE.sigmoid()
        choice_nE = scores_nE.detach() + self.e_score_correction_bias
        if c.n_group > 1:
            grouped = choice_nE.unflatten(1, (c.n_group, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
            # -inf, not 0: a biased score may be negative, and a closed group must still lose to it.
            choice_nE = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)
        own_nK = choice_nE.topk(c.num_experts_per_tok, -1, sorted=False).indices
        index_nK = own_nK if given_nK is None else torch.where(given_nK < c.n_routed_experts, given_nK, own_nK)
        weight_nK = scores_nE.gather(1, index_nK)
        if c.norm_topk_prob:
            weight_nK = weight_nK / (weight_nK.sum(-1, keepdim=True) + 1e-20)
        return weight_nK * c.routed_scaling_factor, Routing(logits_nE, index_nK, None if given_nK is None else own_nK)

    @torch.no_grad()
    def balance(self, load_E: Tensor, rate: float, fine: Tensor | None = None) -> None:
        """b += rate * sign(mean(load) - load), then centred, so that overloaded experts are chosen less (arXiv 2408.15664).

        load_E: tokens routed to each expert over a whole optimizer step, all micro-batches and ranks. Where `fine` (a bool on the
        device) does not hold, nothing changes.
        """
        load, bias = load_E.float(), self.e_score_correction_bias
        moved = bias + rate * torch.sign(load.mean() - load)
        moved -= moved.mean()
        bias.copy_(moved if fine is None else torch.where(fine, moved, bias))


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        # Where several ranks share out the experts, and this one holds a few: takes (here, x, weight, index) to those who have them.
        self.dispatch: Callable[..., Tensor] | None = None

    def forward(self, x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted; [n, D]."""
        return self.dispatch(self.here, x_nD, weight_nK, index_nK) if self.dispatch else self.here(x_nD, weight_nK, index_nK)

    def here(self, x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """The same, of experts that are all held here. Every path computes the same sum (parity: tests)."""
        n = len(x_nD)
        if x_nD.device.type != "cpu" and n:
            return self.by_grouped_mm(x_nD, weight_nK, index_nK)
        if n == 1:
            return self.by_token(x_nD, weight_nK, index_nK)
        if not torch.is_grad_enabled() and 0 < n * len(self.gate_up_proj) <= 512:
            return self.by_all(x_nD, weight_nK, index_nK)
        return self.by_segment(x_nD, weight_nK, index_nK)

    def by_loop(self, x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """The reference: one expert after the other."""
        out = torch.zeros_like(x_nD)
        for e in range(len(self.gate_up_proj)):
            token, slot = torch.where(index_nK == e)
            gate, up = F.linear(x_nD[token], self.gate_up_proj[e]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.down_proj[e])
            out = out.index_add(0, token, y * weight_nK[token, slot, None].to(y.dtype))
        return out

    def by_segment(self, x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """Each expert's tokens side by side in a segment, one matmul a segment. Nothing is dropped.

        A segment is a multiple of SEGMENT rows: a CPU matmul is prepared anew for every shape it has not seen. FEW tokens an expert
        get segments as long as the longest, for one batched matmul.
        """
        E, (n, K) = len(self.gate_up_proj), index_nK.shape
        flat = index_nK.flatten()
        load_E = torch.bincount(flat, minlength=E)
        rows_E = (load_E + SEGMENT - 1) // SEGMENT * SEGMENT
        if n * K <= FEW * E:
            rows_E = rows_E.max().expand(E)
        order = flat.argsort(stable=True)
        sorted_expert = flat[order]
        before_E = (rows_E - load_E).cumsum(0) - (rows_E - load_E)  # unused rows in front of each expert's
        slot_sorted = torch.arange(n * K, device=flat.device) + before_E[sorted_expert]
        slot = torch.empty_like(order).scatter_(0, order, slot_sorted)  # (token, k) -> row
        source = torch.full((int(rows_E.sum()),), -1, device=flat.device).scatter_(0, slot_sorted, order)  # row -> (token, k), or -1
        rows = rows_E.tolist()
        spread = _Spread.apply(x_nD, source, slot, K)
        gate, up = _Segments.apply(spread, self.gate_up_proj, rows).chunk(2, -1)
        y = _Segments.apply(F.silu(gate) * up, self.down_proj, rows)
        return (_Collect.apply(y, source, slot).view(n, K, y.shape[1]) * weight_nK.unsqueeze(-1).to(y.dtype)).sum(1)

    def by_all(self, x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """Every expert on every token: more arithmetic, but two matmuls and no sorting; wins for a handful of tokens."""
        n, E = len(x_nD), len(self.gate_up_proj)
        weight_nE = x_nD.new_zeros(n, E).scatter_(1, index_nK, weight_nK.to(x_nD.dtype))
        gate, up = F.linear(x_nD, self.gate_up_proj.flatten(0, 1)).view(n, E, -1).chunk(2, -1)
        hidden = F.silu(gate).mul_(up).mul_(weight_nE.unsqueeze(-1))
        return torch.bmm(hidden.transpose(0, 1), self.down_proj.transpose(1, 2)).sum(0)

    def by_token(self, x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """Only the chosen experts, one at a time: touches the least memory, for a single token."""
        out = []
        for row, weight, experts in zip(x_nD.split(1), weight_nK.to(x_nD.dtype), index_nK.tolist(), strict=True):
            gate, up = torch.cat([F.linear(row, self.gate_up_proj[e]) for e in experts]).chunk(2, -1)
            hidden = F.silu(gate).mul_(up).mul_(weight.unsqueeze(1)).split(1)
            parts = [F.linear(h, self.down_proj[e]) for h, e in zip(hidden, experts, strict=True)]
            out.append(torch.cat(parts).sum(0, keepdim=True))
        return torch.cat(out)

    def by_grouped_mm(self, x_nD: Tensor, weight_nK: Tensor, index_nK: Tensor) -> Tensor:
        """Sorted tokens through PyTorch's grouped matmul: no padding; the path for CUDA."""
        K = index_nK.shape[1]
        flat = index_nK.flatten()
        order = flat.argsort(stable=True)
        load_E = torch.zeros_like(flat[:1]).expand(len(self.gate_up_proj)).scatter_add(0, flat, torch.ones_like(flat))
        ends = load_E.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x_nD[order // K], self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        y = y * weight_nK.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x_nD).index_add(0, order // K, y)


class _Segments(torch.autograd.Function):
    """Segment e of the rows times weight[e]^T."""

    @staticmethod
    def forward(ctx, x: Tensor, weight_EFD: Tensor, rows: list[int]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight_EFD)
        ctx.rows = rows
        if len(set(rows)) == 1:
            return torch.bmm(x.view(len(rows), rows[0], x.shape[1]), weight_EFD.transpose(1, 2)).flatten(0, 1)
        y = x.new_empty(len(x), weight_EFD.shape[1])
        for own, out, weight in zip(x.split(rows), y.split(rows), weight_EFD, strict=True):
            torch.mm(own, weight.t(), out=out)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight_EFD = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight_EFD)
        parts = (tensor.split(ctx.rows) for tensor in (grad, x, grad_x))
        for own, inner, out, weight, slope in zip(*parts, weight_EFD, grad_weight, strict=True):
            torch.mm(own, weight, out=out)
            torch.mm(own.t(), inner, out=slope)
        return grad_x, grad_weight, None


class _Spread(torch.autograd.Function):
    """Tokens to their experts' rows; rows without one get any. Its backward is a gather too, because (token, k) <-> row is one to one;
    PyTorch's own backward of indexing is a scatter-add, several times slower on the CPU."""

    @staticmethod
    def forward(ctx, x_nD: Tensor, source: Tensor, slot: Tensor, K: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slot)
        ctx.shape = (len(x_nD), K)
        return x_nD.index_select(0, (source // K).clamp_(min=0))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (slot,) = ctx.saved_tensors
        return grad.index_select(0, slot).view(*ctx.shape, grad.shape[1]).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """Experts' rows back to (token, k) order; unused rows get no gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, source: Tensor, slot: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(source)
        return y.index_select(0, slot)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (source,) = ctx.saved_tensors
        return grad.index_select(0, source.clamp(min=0)).index_fill_(0, (source < 0).nonzero().squeeze(1), 0.0), None, None


class MoE(nn.Module):
    """y = sum of the chosen experts + shared experts (one MLP of their joint width)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None, given_BTK: Tensor | None = None) -> tuple[Tensor, Routing]:
        """[B, T, D] -> [B, T, D] and the routing of the B * T tokens.

        real_BT: False for padding, whose output does not matter. Alike as it is, it would all go to the same few experts; it is dealt
        out evenly instead. given_BTK: the experts to use, see Router.
        """
        x_nD = x_BTD.flatten(0, -2)
        weight_nK, routing = self.gate(x_nD, None if given_BTK is None else given_BTK.flatten(0, -2))
        index_nK = routing.chosen
        if real_BT is not None:
            dealt = torch.arange(index_nK.numel(), device=x_nD.device).view_as(index_nK) % len(self.gate.weight)
            index_nK = torch.where(real_BT.view(-1, 1), index_nK, dealt)
        y = self.experts(x_nD, weight_nK, index_nK)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x_nD)
        return y.view_as(x_BTD), routing
