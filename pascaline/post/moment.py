"""What the trainer itself says to a rollout, with the weights that sampled it: a forward before the first minibatch.

On one engine its log-probabilities are the engine's (Law 1: within 1e-4 in float32); in bf16, or of another sampler, they are not.
"""

from typing import Any

import torch

from pascaline.data.batch import Batch
from pascaline.model.transformer import Model
from pascaline.post.reference import logprobs
from pascaline.tables import Rl
from pascaline.train.policy import corrected


class Moment:
    """Puts what `rl` asks for into a rollout's batches. With tis the ratio is to the trainer's own log-probabilities (`old_logprob`), the
    engine's stand in `engine_logprob`, and the advantages are multiplied by the truncated weights, for every surrogate is linear in
    them; with mask_low or mask_high the advantage is 0 where the two are too far apart. With replay the experts are those of `routes`,
    which the engine has used. facts: of the last rollout."""

    def __init__(self, model: Model, rl: Rl):
        self.model, self.rl = model, rl
        self.facts: dict[str, Any] = {}

    @property
    def wanted(self) -> bool:
        """Whether a forward is asked for at all."""
        return bool(self.rl.tis or self.rl.mask_low or self.rl.mask_high)

    def seen(self, batches: list[Batch]) -> list[Batch]:
        found, gaps, weights = [], [], []
        for batch in batches:
            own = logprobs(self.model, batch, self.rl.replay)
            streams = dict(batch.streams)
            sampled = streams["rl"].ne(0)
            gaps.append((own - streams["old_logprob"])[sampled].abs())
            weight = corrected(own, streams["old_logprob"], self.rl.tis, self.rl.mask_low, self.rl.mask_high)
            weights.append(weight[sampled])
            streams["advantage"] = streams["advantage"] * weight
            if self.rl.tis:
                streams |= {"engine_logprob": streams["old_logprob"], "old_logprob": own}
            found.append(Batch(batch.tokens, batch.positions, batch.document_ids, streams))
        if gaps:
            each = torch.cat(weights)
            self.facts = {"engine_gap": float(torch.cat(gaps).max()), "tis_weight": float(each.mean())}
            self.facts |= {"masked": float((each == 0).float().mean())}
        else:
            self.facts = {}
        return found
