"""One loss for every stage: ce + rl + kl + pair + score + mtp + balance + z, each a weighted sum over tokens (pair and score: a sum over
pairs of answers) divided by its own total weight.

Shapes: B rows, T tokens, m tokens that carry any weight.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pascaline.data.batch import Batch, moved
from pascaline.model.moe import Routing
from pascaline.model.transformer import Model
from pascaline.train import preference
from pascaline.train.policy import FAR, Policy, distance, policy_loss
from pascaline.train.preference import Preference

WEIGHTS = ("ce", "rl", "kl", *preference.PAIRED)
PARTS = (*WEIGHTS, "mtp", "balance", "z")
CHUNK = 512  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Loss:
    """Constants of the loss. policy: of what sampled tokens teach; preference: of what pairs teach; mtp: weight of the multi-token loss
    (arXiv 2412.19437 eq. 25); balance: of the sequence-wise balance loss (eq. 17 there); z: of the squared log-partition of the head
    (PaLM, arXiv 2204.02311 section 5).

    mtp_apart: the multi-token loss lies on the tokens of `rl`, whatever their advantage, and teaches the MTP modules alone: they follow
    the policy, which learns as if they were not there."""

    policy: Policy = field(default_factory=Policy)
    preference: Preference = field(default_factory=Preference)
    mtp: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    mtp_apart: bool = False

    @property
    def mtp_stream(self) -> str:
        """Whose tokens the multi-token loss lies on."""
        return "rl" if self.mtp_apart else "ce"


def totals(batches: Iterable[Batch]) -> dict[str, float]:
    """Total weight of each stream over a whole optimizer step (of pairs their number), and `tokens`, how many are not padding."""
    out: dict[str, float] = {"tokens": 0}
    for batch in batches:
        out["tokens"] += int((batch.document_ids >= 0).sum())
        for name in WEIGHTS:
            weight = batch.weight(name)
            own = preference.count(weight) if name in preference.PAIRED else weight.double().sum()
            out[name] = out.get(name, 0.0) + float(own)
    return out


def compute(model: Model, batch: Batch, total: dict[str, float], rule: Loss) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """This micro-batch's share of the step's loss (a scalar with gradient), detached parts to log (shares that add up over the
    micro-batches), and expert loads [L, E] with the MTP modules' routers last. The batch may still lie in the host's memory: then
    nothing here waits for the device."""
    counting = _counting(batch, total)
    pairs, keep = preference.found(batch, total, counting), moved(counting, model.device)
    batch = batch.to(model.device)
    hidden, routings = model.hidden(batch.tokens, batch.positions, batch.document_ids)
    weights = {n: batch.weight(n) for n in WEIGHTS if total.get(n)}
    target = batch.tokens[:, 1:].flatten()[keep]
    kept = hidden[:, :-1].flatten(0, 1).index_select(0, keep)
    logprob, log_z, entropy = token_logprobs(kept, model.head_weight, target, with_entropy="rl" in weights)

    def stream(name: str) -> Tensor:
        return batch.streams[name][:, 1:].flatten()[keep]

    parts: dict[str, Tensor] = {}
    if "ce" in weights:
        parts["ce"] = -(weights["ce"][keep] * logprob).sum() / total["ce"]
        if rule.z:
            parts["z"] = rule.z * (weights["ce"][keep] * log_z.square()).sum() / total["ce"]
    log_ratio = None
    if "rl" in weights:
        w, log_ratio = weights["rl"][keep], logprob - stream("old_logprob")
        loss, clipped = policy_loss(logprob, log_ratio, stream("advantage"), _answers(batch)[keep], w.ne(0).float(), rule.policy)
        parts["rl"] = (w * loss).sum() / total["rl"]
    if "kl" in weights:
        apart = distance(logprob, stream("ref_logprob"), log_ratio, rule.policy)
        parts["kl"] = rule.policy.kl * (weights["kl"][keep] * apart).sum() / total["kl"]
    paired, paired_logs = preference.parts(model, batch, hidden, logprob, pairs, total, rule.preference)
    parts |= paired
    if rule.mtp and rule.mtp_stream in weights:
        mtp, mtp_routings = _mtp(model, batch, hidden, total[rule.mtp_stream], rule)
        parts["mtp"] = rule.mtp * mtp
        routings += mtp_routings
    real = batch.document_ids >= 0
    if rule.balance and routings:
        shares = [sequence_balance(routing, real) for routing in routings]
        parts["balance"] = rule.balance * torch.stack(shares).sum() / total["tokens"]
    logs = {name: part.detach() for name, part in parts.items()} | paired_logs
    if routings:
        with torch.no_grad():
            logs["router_entropy"] = torch.stack([router_entropy(routing, real) for routing in routings]) / total["tokens"]
    if entropy is not None:
        assert log_ratio is not None
        with torch.no_grad():
            share = w / total["rl"]
            told = {"entropy": entropy, "clipped": clipped, "mismatch": log_ratio.abs(), "ratio": log_ratio.clamp(-FAR, FAR).exp()}
            logs |= {name: (share * values).sum() for name, values in told.items()}
    loads = [routing.load(real) for routing in routings]
    return torch.stack(list(parts.values())).sum(), logs, torch.stack(loads) if loads else torch.zeros(0, model.config.n_routed_experts)


def _answers(batch: Batch) -> Tensor:
    """Which document each target is of, flattened [B (T - 1)]; another number for every document of the batch."""
    B, T = batch.document_ids.shape
    return (batch.document_ids[:, 1:] + T * torch.arange(B, device=batch.document_ids.device)[:, None]).flatten()


def _counting(batch: Batch, total: dict[str, float]) -> Tensor:
    """Where, among the flattened targets, any stream has weight; int64 [m]."""
    return torch.stack([batch.weight(n) for n in WEIGHTS if total.get(n)]).ne(0).any(0).nonzero().squeeze(1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_mD: Tensor, weight_VD: Tensor, target_m: Tensor, with_entropy: bool):  # type: ignore[no-untyped-def]
        logprob, log_z = (torch.empty(len(hidden_mD), device=hidden_mD.device) for _ in range(2))
        entropy = torch.empty_like(log_z) if with_entropy else None
        for span, logits in _logits(hidden_mD, weight_VD):
            target = logits.gather(1, target_m[span, None]).squeeze(1)
            if entropy is not None:
                mean = (logits.softmax(-1) * logits).sum(-1)
            largest = logits.amax(-1, keepdim=True)
            log_z[span] = logits.sub_(largest).exp_().sum(-1).log_() + largest.squeeze(1)
            logprob[span] = target - log_z[span]
            if entropy is not None:
                entropy[span] = log_z[span] - mean
        ctx.save_for_backward(hidden_mD, weight_VD, target_m)
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprob, log_z, entropy

    @staticmethod
    def backward(ctx, grad_m: Tensor, grad_z_m: Tensor, _: Tensor | None):  # type: ignore[no-untyped-def]
        hidden_mD, weight_VD, target_m = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_mD)
        grad_weight = torch.zeros(weight_VD.shape, device=weight_VD.device) if ctx.needs_input_grad[1] else None
        for span, logits in _logits(hidden_mD, weight_VD):
            # d(logprob)/d(logits) = onehot - p, d(log_z)/d(logits) = p
            p = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
            slope = p.mul_(((grad_z_m - grad_m)[span] / p.sum(-1)).unsqueeze(1))
            slope = slope.scatter_add_(1, target_m[span, None], grad_m[span, None]).to(hidden_mD.dtype)
            torch.mm(slope, weight_VD, out=grad_hidden[span])
            if grad_weight is not None:
                grad_weight += slope.t() @ hidden_mD[span]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None


def _logits(hidden_mD: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some tokens, and their logits in float32: the same memory each time, for on the CPU fresh memory costs as much as arithmetic."""
    m, V = len(hidden_mD), len(weight_VD)
    tokens = max(min(CHUNK, m), 1)  # also a micro-batch of which no token counts
    narrow, wide = hidden_mD.new_empty(tokens, V), torch.empty(tokens, V, device=hidden_mD.device)
    for at in range(0, m, tokens):
        part = hidden_mD[at : at + tokens]
        logits = torch.mm(part, weight_VD.t(), out=narrow[: len(part)])
        yield slice(at, at + len(part)), logits if logits.dtype == torch.float32 else wide[: len(part)].copy_(logits)


def token_logprobs(
    hidden_mD: Tensor, weight_VD: Tensor, target_m: Tensor, with_entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability of each target under the head, log sum exp of the logits there, and if asked the entropy (no gradient); each [m]
    float32.

    Logits exist for CHUNK tokens at a time and are computed again in the backward: a third more arithmetic in the head, but
    [m, V] is never held, and on the CPU the chunk stays in the cache. One-layer reference: F.cross_entropy (parity: tests).
    """
    return _TokenLogprobs.apply(hidden_mD, weight_VD, target_m, with_entropy)


def sequence_balance(routing: Routing, real_BT: Tensor) -> Tensor:
    """sum_i f_i P_i of each row, times its tokens, summed over the rows: f_i the expert's share of the choices times E (1 when even),
    P_i the mean of its normalised score (DeepSeek-V3, arXiv 2412.19437 eq. 17-20, without alpha). A row is the sequence."""
    scores = routing.logits.sigmoid()
    real_BT1 = real_BT.unsqueeze(-1).to(scores.dtype)
    share_BTE = (scores / scores.sum(-1, keepdim=True)).view(*real_BT.shape, -1) * real_BT1
    chosen_BTE = torch.zeros_like(scores).scatter_(1, routing.chosen, 1.0).view_as(share_BTE) * real_BT1
    tokens_B1 = real_BT1.sum(1).clamp(min=1)
    E, K = scores.shape[-1], routing.chosen.shape[-1]
    f_BE = chosen_BTE.sum(1) * (E / K) / tokens_B1
    return (f_BE * share_BTE.sum(1)).sum()


def router_entropy(routing: Routing, real_BT: Tensor) -> Tensor:
    """Entropy in nats of each token's normalised scores, summed over the tokens that are not padding; log E when it cannot tell."""
    scores = routing.logits.sigmoid()
    share = scores / scores.sum(-1, keepdim=True)
    return (torch.special.entr(share).sum(-1) * real_BT.flatten()).sum()  # a mask, not an index: no wait for the device


def _mtp(model: Model, batch: Batch, hidden: Tensor, total: float, rule: Loss) -> tuple[Tensor, list[Routing]]:
    """Mean over depths k of the cross-entropy of token t + 1 + k from position t, where it lies in the same document."""
    losses, routings = [], []
    head = model.head_weight.detach() if rule.mtp_apart else model.head_weight
    depths = model.mtp_hidden(hidden, batch.tokens, batch.positions, batch.document_ids, rule.mtp_apart)
    for k, (states, routing) in enumerate(depths, 1):
        ahead = 1 + k
        same = batch.document_ids[:, ahead:] == batch.document_ids[:, :-ahead]
        weight = (batch.weight(rule.mtp_stream).view(len(same), -1)[:, k:] * same).flatten()
        logprob, *_ = token_logprobs(states[:, :-ahead].flatten(0, 1), head, batch.tokens[:, ahead:].flatten())
        losses.append(-(weight * logprob).sum() / total)
        if routing is not None:
            routings.append(routing)
    return torch.stack(losses).mean(), routings
