"""A teacher's most probable tokens at every place of a set of samples, in files: written once, read while a student trains.

A part is one safetensors file: `tokens` [t] of its samples one after another, `ends` [s] where each of them ends, `weight` [t] of each
token in the loss, and, for the n tokens with weight, in their order, `ids` [n, k] of the teacher's k most probable tokens there and their
`logprobs` [n, k], float32. Ids take two bytes where the vocabulary lets them: a taught token costs 6 k + 6 bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from pascaline.data.batch import Sample
from pascaline.runs import atomic_path

Top = tuple[np.ndarray, np.ndarray]  # ids and log-probabilities, each [n, k]


def taught(sample: Sample) -> np.ndarray:
    """The places of a sample's tokens that carry weight in `ce`; the first has nothing before it that it could follow from."""
    return np.flatnonzero(sample.streams["ce"][1:]) + 1


def write(path: Path, samples: Sequence[Sample], tops: Sequence[Top], vocab_size: int, facts: dict[str, Any]) -> None:
    """One part, whole or absent. tops: of each sample, a row for each of its places `taught`. facts: JSON that is kept in it."""
    small = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    tensors = {
        "tokens": np.concatenate([s.tokens for s in samples]).astype(small),
        "ends": np.cumsum([len(s.tokens) for s in samples]),
        "weight": np.concatenate([s.streams["ce"] for s in samples]),
        "ids": np.concatenate([ids for ids, _ in tops]).astype(small),
        "logprobs": np.concatenate([logprobs for _, logprobs in tops]).astype(np.float32),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"facts": json.dumps(facts)})


def facts(path: Path) -> dict[str, Any] | None:
    """What was kept in a part, None where there is none."""
    if not path.exists():
        return None
    with safe_open(path, "np") as file:
        found: dict[str, Any] = json.loads(file.metadata()["facts"])
    return found


class TopSamples:
    """Samples of some parts with the streams `soft` [t], a token's weight, and `top_ids` and `top_logprobs` [t, k]; read from the files
    when they are asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.files = [safe_open(path, "np") for path in paths]
        ends = [file.get_tensor("ends") for file in self.files]
        self.part = np.repeat(np.arange(len(ends)), [len(own) for own in ends])
        self.begin = np.concatenate([np.append(0, own[:-1]) for own in ends])
        self.lengths = np.concatenate(ends) - self.begin
        counts = [np.add.reduceat(self._counted(i), np.append(0, own[:-1])) for i, own in enumerate(ends)]
        self.count = np.concatenate(counts)  # of taught tokens
        self.row = np.concatenate([np.cumsum(own) - own for own in counts])  # of the first of them among its part's

    def _counted(self, part: int) -> np.ndarray:
        """1 for each token of a part that is taught, else 0."""
        ends = self.files[part].get_tensor("ends")
        found: np.ndarray = (self.files[part].get_tensor("weight") != 0).astype(np.int64)
        found[np.append(0, ends[:-1])] = 0
        return found

    def get(self, i: int) -> Sample:
        file, span = self.files[self.part[i]], slice(int(self.begin[i]), int(self.begin[i] + self.lengths[i]))
        rows = slice(int(self.row[i]), int(self.row[i] + self.count[i]))
        tokens, weight = (file.get_slice(name)[span] for name in ("tokens", "weight"))
        sample = Sample(tokens.astype(np.int64), {"soft": weight})
        places = taught(Sample(tokens, {"ce": weight}))
        for stream, name in (("top_ids", "ids"), ("top_logprobs", "logprobs")):
            known = file.get_slice(name)[rows]
            sample.streams[stream] = np.zeros((len(tokens), known.shape[1]), np.float32)  # exact for ids under 2^24
            sample.streams[stream][places] = known
        return sample

    def name(self, i: int) -> dict[str, Any]:
        return {"sample": i}
