"""The policy that a KL term keeps the trained one close to: the model that RL started from, or the policy of some steps ago."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pascaline.data.batch import Batch
from pascaline.model import hf
from pascaline.model.transformer import Model
from pascaline.train.losses import token_logprobs


class Reference:
    """Fills the streams `kl` and `ref_logprob` of a step's batches.

    every: steps after which the policy becomes the reference, 0: never. What it is at a step follows from the step alone, so that a run
    that is resumed has the same: it is kept in `folder`/STEP, and `origin` is the one of step 0. back: how many steps before the present
    one a run may be resumed from; what that needs is kept.
    """

    def __init__(self, policy: Model, origin: Path, folder: Path, every: int, back: int):
        self.policy, self.origin, self.folder, self.every, self.back = policy, origin, folder, every, back
        self.step, self.model = -1, policy

    @torch.no_grad()
    def compared(self, batches: Iterable[Batch], step: int) -> list[Batch]:
        """The same batches with the reference's log-probability of every sampled token."""
        self._at(step)
        found = []
        for batch in batches:
            ref = logprobs(self.model, batch)
            streams = {**batch.streams, "kl": batch.streams["rl"], "ref_logprob": ref}
            found.append(Batch(batch.tokens, batch.positions, batch.document_ids, streams))
        return found

    def _at(self, step: int) -> None:
        wanted = step // self.every * self.every if self.every else 0
        if wanted == self.step:
            return
        place = self.folder / str(wanted)
        if wanted == step and wanted:  # the policy of this moment
            self.policy.save(place)
            oldest = max(step - self.back, 0) // self.every * self.every
            for old in self.folder.iterdir():
                if int(old.name) < oldest:
                    shutil.rmtree(old, ignore_errors=True)
        self.model = hf.load(place if wanted else self.origin, self.policy.dtype, self.policy.device)
        self.step = wanted


@torch.no_grad()
def logprobs(model: Model, batch: Batch, replay: bool = False) -> Tensor:
    """The model's log-probability of every token that carries `rl`, 0 elsewhere, [B, T] where the batch is. replay: by the experts of the
    record `routes`, not of its routers' choice."""
    here = batch.to(model.device)
    given = here.streams["routes"] if replay else None
    hidden, _ = model.hidden(here.tokens, here.positions, here.document_ids, routes_BTLK=given)
    own, *_ = token_logprobs(hidden[:, :-1].flatten(0, 1), model.head_weight, here.tokens[:, 1:].flatten())
    found = torch.zeros_like(batch.streams["rl"])
    found[:, 1:] = own.view(len(found), -1).to(found.device)
    return found * batch.streams["rl"].ne(0)
