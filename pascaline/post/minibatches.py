"""Several optimizer steps from one rollout: its answers are shuffled and divided, and gone over again.

The policy moves with each of them, so a run that is resumed among them cannot sample the rollout again: it is kept in a file.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pascaline.data.batch import Batch, Sample, batches
from pascaline.errors import BadInput
from pascaline.post.moment import Moment
from pascaline.runs import TEMPORARY, atomic_path
from pascaline.tables import Rl
from pascaline.train import checkpoint
from pascaline.train.loop import Source


class Minibatches:
    """A Source whose step i takes a minibatch of the rollout i // (minibatches epochs), which is that step of the source `rollouts`.

    folder: the stage's, with its checkpoints. Its rollouts/N.safetensors is written before the first minibatch of rollout N, and goes
    when no checkpoint is left that would need it. moment: what it is shown to before. facts: the rollout's, with its first minibatch
    alone, so that no cost counts twice.
    """

    def __init__(self, rollouts: Source, rl: Rl, folder: Path, seed: int, pad: int, name: str = "rl", moment: Moment | None = None):
        self.moment = moment if moment and moment.wanted else None
        self.rollouts, self.rl, self.folder, self.seed, self.pad, self.name = rollouts, rl, folder, seed, pad, name
        self.each = rl.minibatches * rl.epochs
        self.facts: dict[str, Any] = {}
        self.at, self.samples = -1, list[Sample]()  # the rollout under way
        for left in (folder / "rollouts").glob(f".*{TEMPORARY}"):  # of a run that was killed
            left.unlink(missing_ok=True)

    def step(self, step: int) -> list[Batch]:
        rollout, part = divmod(step, self.each)
        if part == 0:
            found = self.rollouts.step(rollout)
            self.facts = {**self.rollouts.facts}
            if self.moment:
                found = self.moment.seen(found)
                self.facts |= self.moment.facts
            if self.each == 1:
                return found
            self.at, self.samples = rollout, documents(found)
            self._forget()
            store(self._file(rollout), self.samples)
        else:
            self.facts = {"rollout_seconds": 0.0, "verify_seconds": 0.0}
            if self.at != rollout:
                self.at, self.samples = rollout, stored(self._file(rollout))
        self.facts["rollout"] = rollout
        return self._packed(self._chosen(rollout, part))

    def documents(self, step: int) -> list[Any]:
        """What `rollouts` names; in minibatches nothing, for the order is another."""
        return self.rollouts.documents(step) if self.each == 1 else []

    def _chosen(self, rollout: int, part: int) -> list[Sample]:
        """The minibatch's answers: each epoch shuffles them anew and cuts them into shares of equal number."""
        epoch, k = divmod(part, self.rl.minibatches)
        order = list(range(len(self.samples)))
        random.Random(f"minibatch {self.name} {self.seed} {rollout} {epoch}").shuffle(order)
        first, stop = (i * len(order) // self.rl.minibatches for i in (k, k + 1))
        chosen = [self.samples[i] for i in order[first:stop]]
        return relimited(chosen, self.samples) if self.rl.average == "limit" else chosen

    def _packed(self, samples: list[Sample]) -> list[Batch]:
        row = max([self.rl.sequence_length, *(len(s.tokens) for s in samples)])
        return batches(samples, row, max(self.rl.micro_tokens // row, 1), self.pad)

    def _file(self, rollout: int) -> Path:
        return self.folder / "rollouts" / f"{rollout}.safetensors"

    def _forget(self) -> None:
        """Drop the rollouts from before the newest checkpoint, but those that an older one lies in the middle of. One that is being
        written is newer, so what it needs stays."""
        saved = checkpoint.steps(self.folder)
        needed = {step // self.each for step in saved}
        for old in (self.folder / "rollouts").glob("*.safetensors"):
            if int(old.stem) < max(needed, default=0) and int(old.stem) not in needed:
                old.unlink()


def documents(found: Sequence[Batch]) -> list[Sample]:
    """The samples that batches were packed from, in the order in which they stand there, with all streams of the batches."""
    samples = []
    for batch in found:
        tokens, ids = batch.tokens.numpy(), batch.document_ids.numpy()
        streams = {name: stream.numpy() for name, stream in batch.streams.items()}
        for row, own in enumerate(ids):
            for d in range(int(own.max()) + 1):
                at = own == d
                samples.append(Sample(tokens[row][at], {name: stream[row][at] for name, stream in streams.items()}))
    return samples


def relimited(chosen: list[Sample], whole: list[Sample]) -> list[Sample]:
    """`chosen` of the `whole` rollout, for the average "limit": the advantages hold the factor that makes the mean over the rollout's
    tokens a sum over its answers times the limit (grpo.averaged); here the mean is over other tokens, whose answers may be longer."""

    def weight(samples: list[Sample]) -> float:
        each = [float(s.streams["rl"].sum(dtype=np.float64)) for s in samples]
        return sum(each) / max(sum(map(bool, each)), 1)  # a report on an answer is none

    factor = np.float32(weight(chosen) / max(weight(whole), 1e-30))
    return [replace(s, streams={**s.streams, "advantage": s.streams["advantage"] * factor}) for s in chosen]


def store(path: Path, samples: list[Sample]) -> None:
    """Samples with the same streams each, end to end in one file."""
    parts = {"lengths": np.array([len(s.tokens) for s in samples], np.int64)}
    if samples:
        parts["tokens"] = np.concatenate([s.tokens for s in samples])
        parts |= {f"stream.{name}": np.concatenate([s.streams[name] for s in samples]) for name in samples[0].streams}
    with atomic_path(path) as temporary:
        save_file(parts, temporary)


def stored(path: Path) -> list[Sample]:
    """What `store` wrote. BadInput where it is not there, or damaged."""
    try:
        parts = load_file(path)
        cuts = np.cumsum(parts.pop("lengths"))[:-1]
    except (OSError, SafetensorError, KeyError) as e:
        raise BadInput(f"the rollout {path}, which the checkpoint is in the middle of, cannot be read ({e}); delete that checkpoint, or "
                       "start over with --fresh.") from None  # fmt: skip
    if not parts:
        return []
    tokens = np.split(parts.pop("tokens"), cuts)
    streams = {name.removeprefix("stream."): np.split(values, cuts) for name, values in parts.items()}
    return [Sample(own, {name: values[i] for name, values in streams.items()}) for i, own in enumerate(tokens)]
