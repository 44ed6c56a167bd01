"""What a pair of answers teaches, of which one is better: the losses of DPO, IPO and a Bradley-Terry reward model.

A pair is one sample of two documents, prompt + chosen and prompt + rejected, side by side in one row. Its weight stream (`pair`, `score`)
is positive on the tokens of the chosen answer that count, negative on those of the rejected one, and 0 elsewhere. So in a flattened batch
the weights that are not 0 come in runs: chosen, rejected, chosen, rejected, ...

Shapes: k tokens with weight; n pairs; [n, 2] chosen and rejected.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pascaline.data.batch import Batch, moved
from pascaline.model.transformer import Model

PAIRED = ("pair", "score")  # streams of pairs: their total weight is the number of pairs


@dataclass(frozen=True)
class Preference:
    """Constants of the loss. method: "sigmoid", also of length-normalised DPO, whose weights differ, or "ipo"."""

    method: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1


@dataclass(frozen=True)
class Runs:
    """at [k]: where in the flattened targets a weight is not 0; inside [k]: which of the step's counting targets that is; lengths [2 n]:
    tokens of each run. All int64."""

    at: Tensor
    inside: Tensor
    lengths: Tensor

    def sums(self, values_k: Tensor) -> Tensor:
        """Of each answer, float32 [n, 2], with gradient. No atomic additions, so the bits are the same every time."""
        if not len(values_k):  # a micro-batch without pairs still has a graph
            return values_k.float().view(0, 2)
        return torch.segment_reduce(values_k.float(), "sum", lengths=self.lengths, unsafe=True).view(-1, 2)


def _lengths(weight_k: Tensor) -> Tensor:
    """Tokens of each run of weights of one sign; none is 0."""
    positive = weight_k > 0
    begins = torch.ones_like(positive)
    begins[1:] = positive[1:] != positive[:-1]
    starts = begins.nonzero().squeeze(1)
    return torch.diff(starts, append=starts.new_tensor([len(weight_k)]))


def count(weight: Tensor) -> int:
    """Pairs in the flattened weights of a stream."""
    return len(_lengths(weight[weight.ne(0)])) // 2


def found(batch: Batch, total: dict[str, float], counting: Tensor) -> dict[str, Runs]:
    """The pairs of a micro-batch, by stream. counting: where any stream has weight. Of a batch on the host this waits for no device."""
    out: dict[str, Runs] = {}
    for name in PAIRED:
        if total.get(name):
            at = (weight := batch.weight(name)).nonzero().squeeze(1)
            out[name] = Runs(at, torch.searchsorted(counting, at), _lengths(weight[at]))
    return out


def parts(
    model: Model, batch: Batch, hidden: Tensor, logprob: Tensor, pairs: dict[str, Runs], total: dict[str, float], rule: Preference
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the pairs of a micro-batch, now on the model's device, add to the loss, and what to log of them: shares that add up over the
    micro-batches. hidden [B, T, D]; logprob: of the counting targets."""
    out: dict[str, Tensor] = {}
    logs: dict[str, Tensor] = {}
    own = {name: Runs(*(moved(t, model.device) for t in (runs.at, runs.inside, runs.lengths))) for name, runs in pairs.items()}
    if runs := own.get("pair"):
        weight, answers = batch.weight("pair")[runs.at].abs(), logprob[runs.inside]
        reference = batch.streams["ref_logprob"][:, 1:].flatten()[runs.at] if len(runs.at) else answers  # an empty row has no streams
        change = runs.sums(weight * (answers - reference))
        out["pair"] = pair_loss(change, rule).sum() / total["pair"]
        told = told_of_pairs(runs.sums(weight * answers.detach()), change.detach(), rule.beta)
        logs |= {name: values.sum() / total["pair"] for name, values in told.items()}
    if (runs := own.get("score")) and model.reward_head is not None:
        ends = runs.at + runs.at // (batch.tokens.shape[1] - 1) + 1  # the scored tokens themselves; a target is predicted one place before
        score = runs.sums(model.reward_head(hidden.flatten(0, 1).index_select(0, ends)))
        out["score"] = score_loss(score).sum() / total["score"]
        logs |= {name: values.sum() / total["score"] for name, values in told_of_scores(score.detach()).items()}
    return out, logs


def pair_loss(change_n2: Tensor, rule: Preference) -> Tensor:
    """Loss of each pair [n]. change_n2: log pi(y|x) - log pi_ref(y|x) of both answers, h their difference:

    - "sigmoid": -log sigmoid(beta h). DPO (arXiv 2305.18290 eq. 7) where the log-probabilities are sums over the answer's tokens;
      length-normalised DPO (Tulu 3, arXiv 2411.15124 section 5) where they are means.
    - "ipo": (h - 1 / (2 beta))^2 (arXiv 2310.12036 eq. 17, tau = beta), on means: the paper writes the log-probability of the answer, and
      TRL's source says that its authors confirmed the division by length.
    """
    h = change_n2[:, 0] - change_n2[:, 1]
    return (h - 1 / (2 * rule.beta)).square() if rule.method == "ipo" else -F.logsigmoid(rule.beta * h)


def score_loss(score_n2: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected), the negative log-likelihood of Bradley and Terry (1952) [n] (arXiv 2203.02155 eq. 1)."""
    return -F.logsigmoid(score_n2[:, 0] - score_n2[:, 1])


def told_of_pairs(logprob_n2: Tensor, change_n2: Tensor, beta: float) -> dict[str, Tensor]:
    """What to log of each pair [n]. margin: of the implicit rewards, beta h; accuracy: whether it is positive, a half where it is 0;
    both_fell: whether both answers are less probable than under the reference, which is how DPO is known to fail (arXiv 2402.13228)."""
    margin = beta * (change_n2[:, 0] - change_n2[:, 1])
    sides = {f"{side}_{what}": of[:, i] for what, of in (("logprob", logprob_n2), ("change", change_n2)) for i, side in _SIDES}
    return {"margin": margin, "accuracy": _won(margin), **sides, "both_fell": (change_n2 < 0).all(1).float()}


def told_of_scores(score_n2: Tensor) -> dict[str, Tensor]:
    """What to log of each pair [n] of a reward model."""
    margin = score_n2[:, 0] - score_n2[:, 1]
    return {"margin": margin, "accuracy": _won(margin), **{f"{side}_score": score_n2[:, i] for i, side in _SIDES}}


_SIDES = ((0, "chosen"), (1, "rejected"))


def _won(margin: Tensor) -> Tensor:
    return (margin.sign() + 1) / 2
