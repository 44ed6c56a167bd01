"""The loss of each range of positions is the plain cross-entropy of its tokens."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from pascaline.eval.perplexity import by_position

ENDS = [8, 16, 40]


def test_each_range_is_the_cross_entropy_of_its_tokens() -> None:
    model, rng = tiny_model(), np.random.default_rng(0)
    texts = [rng.integers(0, 61, n).astype(np.uint16) for n in (60, 40, 12, 1)]
    calls: list[int] = []
    found = by_position(model, texts, ENDS, lambda: calls.append(1))
    losses: list[list[float]] = [[], [], []]
    for text in texts:
        ids = torch.from_numpy(text[:40].astype(np.int64))
        with torch.no_grad():
            each = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none").tolist()
        for position, loss in enumerate(each, 1):
            losses[sum(position >= end for end in ENDS)].append(loss)
    assert [(span["from"], span["to"], span["documents"]) for span in found] == [(1, 7, 3), (8, 15, 3), (16, 39, 2)]
    for span, expected in zip(found, losses, strict=True):
        assert span["tokens"] == len(expected) and span["nats"] == pytest.approx(np.mean(expected), rel=1e-5)
        assert span["perplexity"] == pytest.approx(math.exp(span["nats"]))
    assert len(calls) == 4


def test_a_range_that_no_text_reaches_has_no_number() -> None:
    found = by_position(tiny_model(), [np.arange(10, dtype=np.uint16)], ENDS)
    assert [span["tokens"] for span in found] == [7, 2, 0] and math.isnan(found[2]["nats"]) and not math.isnan(found[1]["nats"])
