"""One loss for every stage: ce + rl + kl + report + soft + pair + score + mtp + balance + z, each a weighted sum over tokens (pair and
score: over pairs of answers) divided by its own total weight.

Shapes: B rows, T tokens, m tokens that carry any weight, k of a teacher's tokens at each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pascaline.data.batch import Batch, moved
from pascaline.model.moe import Routing
from pascaline.model.transformer import Model
from pascaline.train import preference
from pascaline.train.policy import FAR, Policy, distance, fresh, policy_loss
from pascaline.train.preference import Preference

WEIGHTS = ("ce", "rl", "kl", "report", "soft", *preference.PAIRED)
PARTS = (*WEIGHTS, "mtp", "balance", "z")
CHUNK = 512  # tokens whose logits exist at a time
LEAST = 1e-30  # of the probability that a student leaves for the tokens outside of a teacher's k: its logarithm stays finite


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

    def mtp_stream(self, weights: Iterable[str]) -> str:
        """Whose tokens the multi-token loss lies on, in a step with these streams."""
        return "rl" if self.mtp_apart else "soft" if "soft" in weights else "ce"


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
    micro-batches; of NAME_max the largest counts), and expert loads [L, E] with the MTP modules' routers last. The batch may still lie in
    the host's memory: then nothing here waits for the device."""
    counting = _counting(batch, total)
    pairs, keep = preference.found(batch, total, counting), moved(counting, model.device)
    batch = batch.to(model.device)
    routes = batch.streams.get("routes")
    given = routes if rule.policy.replay else None
    hidden, routings = model.hidden(batch.tokens, batch.positions, batch.document_ids, routes_BTLK=given)
    rerouted = None if routes is None else disagreement(routings, routes, batch.document_ids >= 0) / total["tokens"]
    weights = {n: batch.weight(n)[keep] for n in WEIGHTS if total.get(n)}
    target = batch.tokens[:, 1:].flatten()[keep]
    kept = hidden[:, :-1].flatten(0, 1).index_select(0, keep)
    logprob, log_z, entropy = token_logprobs(kept, model.head_weight, target, with_entropy="rl" in weights)
    streams = {name: stream[:, 1:].flatten(0, 1)[keep] for name, stream in batch.streams.items()}
    parts: dict[str, Tensor] = {}
    if "ce" in weights:
        parts["ce"] = -(weights["ce"] * logprob).sum() / total["ce"]
        if rule.z:
            parts["z"] = rule.z * (weights["ce"] * log_z.square()).sum() / total["ce"]
    sampled, logs = _sampled(weights, streams, logprob, entropy, _answers(batch)[keep], total, rule.policy)
    paired, more = preference.parts(model, batch, hidden, logprob, pairs, total, rule.preference)
    parts |= sampled | paired
    if "soft" in weights:
        nats = soft_loss(kept, model.head_weight, streams["top_ids"].long(), streams["top_logprobs"])
        parts["soft"] = (weights["soft"] * nats).sum() / total["soft"]
    spoken = rule.mtp_stream(weights)
    if rule.mtp and spoken in weights:
        mtp, mtp_routings = _mtp(model, batch, hidden, spoken, total[spoken], rule.mtp_apart)
        parts["mtp"] = rule.mtp * mtp
        routings += mtp_routings
    real = batch.document_ids >= 0
    if rule.balance and routings:
        shares = [sequence_balance(routing, real) for routing in routings]
        parts["balance"] = rule.balance * torch.stack(shares).sum() / total["tokens"]
    logs |= {name: part.detach() for name, part in parts.items()} | more
    if routings:
        with torch.no_grad():
            logs["router_entropy"] = torch.stack([router_entropy(routing, real) for routing in routings]) / total["tokens"]
    if rerouted is not None:
        logs["rerouted"] = rerouted
    loads = [routing.load(real) for routing in routings]
    return torch.stack(list(parts.values())).sum(), logs, torch.stack(loads) if loads else torch.zeros(0, model.config.n_routed_experts)


def _sampled(
    weights: dict[str, Tensor],
    streams: dict[str, Tensor],
    logprob: Tensor,
    entropy: Tensor | None,
    answers: Tensor,
    total: dict[str, float],
    policy: Policy,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of what the policy has sampled, and what to log of it. weights: of the m tokens in each stream; answers: which document
    each of them is of."""
    parts: dict[str, Tensor] = {}
    logs: dict[str, Tensor] = {}
    log_ratio = logprob - streams["old_logprob"] if "rl" in weights or "report" in weights else None
    if "rl" in weights and log_ratio is not None:
        w, advantage, mask = weights["rl"], streams["advantage"], weights["rl"].ne(0).float()
        loss, clipped = policy_loss(logprob, log_ratio, advantage, answers, mask, policy)
        # The engine's log-probabilities stand apart where the ratio is to the trainer's own of that moment.
        gap = (logprob - streams["engine_logprob" if "engine_logprob" in streams else "old_logprob"]).detach()
        ratio = log_ratio.detach().clamp(-FAR, FAR).exp()
        told = {"entropy": entropy, "clipped": clipped, "mismatch": gap.abs(), "ratio": ratio}
        if policy.stale:
            near = fresh(gap, advantage, answers, mask, policy.stale)
            loss, told["stale"] = loss * near, 1 - near
        parts["rl"] = (w * loss).sum() / total["rl"]
        logs |= {name: (w / total["rl"] * values).sum() for name, values in told.items() if values is not None}
        logs |= {"ratio_max": _largest(ratio * mask), "gap_max": _largest(gap.abs() * mask)}
    if "kl" in weights:
        apart = (weights["kl"] * distance(logprob, streams["ref_logprob"], log_ratio, policy)).sum() / total["kl"]
        parts["kl"], logs["reference_kl"] = policy.kl * apart, apart.detach()
    if "report" in weights and log_ratio is not None:  # as rl, but of tokens that rl has no weight on, and by their own count
        mask = weights["report"].ne(0).float()
        loss, _ = policy_loss(logprob, log_ratio, streams["advantage"], answers, mask, policy)
        parts["report"] = (weights["report"] * loss).sum() / total["report"]
    return parts, logs


def _largest(values: Tensor) -> Tensor:
    """0 for none: a micro-batch may have no token that counts."""
    return torch.cat((values, values.new_zeros(1))).amax()


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


class _SoftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_mD: Tensor, weight_VD: Tensor, ids_mk: Tensor, logprobs_mk: Tensor):  # type: ignore[no-untyped-def]
        p_mk = logprobs_mk.exp()
        whole = ids_mk.shape[1] == len(weight_VD)  # then nothing is left, whatever rounding says
        rest_m = torch.zeros_like(p_mk[:, 0]) if whole else (1 - p_mk.sum(-1)).clamp(min=0)
        loss = -torch.special.entr(p_mk).sum(-1) - torch.special.entr(rest_m)
        log_z, log_rest = (torch.empty_like(rest_m) for _ in range(2))
        for span, logits in _logits(hidden_mD, weight_VD):
            ids = ids_mk[span]
            top = logits.gather(1, ids)
            largest = logits.amax(-1, keepdim=True)
            share = logits.sub_(largest).exp_()
            log_z[span] = share.sum(-1).log_() + largest.squeeze(1)
            # What is left is added up, not taken from 1: a student that is sure leaves less than 1's rounding.
            log_rest[span] = share.scatter_(1, ids, 0.0).sum(-1).clamp_(min=LEAST).log_() + largest.squeeze(1)
            loss[span] -= (p_mk[span] * (top - log_z[span, None])).sum(-1)
        ctx.save_for_backward(hidden_mD, weight_VD, ids_mk, p_mk, rest_m, log_z, log_rest)
        return loss - rest_m * (log_rest - log_z)

    @staticmethod
    def backward(ctx, grad_m: Tensor):  # type: ignore[no-untyped-def]
        hidden_mD, weight_VD, ids_mk, p_mk, rest_m, log_z, log_rest = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_mD)
        grad_weight = torch.zeros(weight_VD.shape, device=weight_VD.device) if ctx.needs_input_grad[1] else None
        outside_m = 1 - rest_m * (log_z - log_rest).exp()
        for span, logits in _logits(hidden_mD, weight_VD):
            # d(loss)/d(logits) = q - p at the teacher's k tokens, q (1 - p_rest / q_rest) at all others
            q = logits.sub_(log_z[span, None]).exp_()
            inside = q.gather(1, ids_mk[span]) - p_mk[span]
            slope = q.mul_(outside_m[span, None]).scatter_(1, ids_mk[span], inside).mul_(grad_m[span, None]).to(hidden_mD.dtype)
            torch.mm(slope, weight_VD, out=grad_hidden[span])
            if grad_weight is not None:
                grad_weight += slope.t() @ hidden_mD[span]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None


def soft_loss(hidden_mD: Tensor, weight_VD: Tensor, ids_mk: Tensor, logprobs_mk: Tensor) -> Tensor:
    """KL(teacher || student) in nats [m], float32, of what is known of the teacher: the log-probabilities of k different tokens, and that
    all others together have what is left of 1.

    Both distributions are over k + 1 outcomes, the k tokens and "any other": sum p_i log(p_i / q_i) + p_rest log(p_rest / q_rest). It is
    smallest where each of the k has the teacher's own probability. Without the last term, and so too with the k scaled up to sum to 1, it
    is smallest where they have p_i / (1 - p_rest): a student of such targets is too sure, the more the less k covers (Sparse Logit
    Sampling, arXiv 2503.16870). Merging outcomes never adds to a KL, so this is at most the whole one, and equal to it at k = V.

    Logits exist for CHUNK tokens at a time, as in token_logprobs.
    """
    return _SoftLoss.apply(hidden_mD, weight_VD, ids_mk, logprobs_mk)


@torch.no_grad()
def top_logprobs(hidden_mD: Tensor, weight_VD: Tensor, top: int, below: int) -> tuple[Tensor, Tensor]:
    """The `top` most probable of the ids under `below`, the most probable first: int64 [m, top], and their log-probabilities among all V,
    float32 [m, top]."""
    ids = torch.empty(len(hidden_mD), top, dtype=torch.long, device=hidden_mD.device)
    logprobs = torch.empty(ids.shape, device=hidden_mD.device)
    for span, logits in _logits(hidden_mD, weight_VD):
        values, ids[span] = logits[:, :below].topk(top)
        logprobs[span] = values - logits.logsumexp(-1, keepdim=True)
    return ids, logprobs


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


def disagreement(routings: list[Routing], routes_BTLK: Tensor, real_BT: Tensor) -> Tensor:
    """Share of the layers in which a token's router chooses other experts than are recorded, summed over the tokens that are no padding."""
    recorded = routes_BTLK.flatten(0, 1).long().unbind(1)
    differs_Ln = torch.stack([routing.differs(chosen) for routing, chosen in zip(routings, recorded, strict=True)])
    return (differs_Ln & real_BT.flatten()).sum() / len(routings)


def _mtp(model: Model, batch: Batch, hidden: Tensor, stream: str, total: float, is_apart: bool) -> tuple[Tensor, list[Routing]]:
    """Mean over depths k of the cross-entropy of token t + 1 + k from position t, where it lies in the same document."""
    losses, routings = [], []
    head = model.head_weight.detach() if is_apart else model.head_weight
    depths = model.mtp_hidden(hidden, batch.tokens, batch.positions, batch.document_ids, is_apart)
    for k, (states, routing) in enumerate(depths, 1):
        ahead = 1 + k
        same = batch.document_ids[:, ahead:] == batch.document_ids[:, :-ahead]
        weight = (batch.weight(stream).view(len(same), -1)[:, k:] * same).flatten()
        logprob, *_ = token_logprobs(states[:, :-ahead].flatten(0, 1), head, batch.tokens[:, ahead:].flatten())
        losses.append(-(weight * logprob).sum() / total)
        if routing is not None:
            routings.append(routing)
    return torch.stack(losses).mean(), routings
