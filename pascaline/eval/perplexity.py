"""How well a model predicts held-out text, by the position of the token."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pascaline.model.transformer import Model
from pascaline.train.losses import token_logprobs


@torch.no_grad()
def by_position(
    model: Model, texts: Sequence[np.ndarray], ends: Sequence[int], watch: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Mean loss of the tokens of each range of positions, in nats a token, and its perplexity; null where no text reaches.

    texts: token ids, each read up to ends[-1]; ends: where the ranges end, ascending: the first is 1..ends[0] - 1 (nothing predicts
    token 0), the next ends[0]..ends[1] - 1. watch is called after each text.
    """
    nats, tokens, documents = np.zeros(len(ends)), np.zeros(len(ends), np.int64), np.zeros(len(ends), np.int64)
    for text in texts:
        ids = torch.from_numpy(text[: ends[-1]].astype(np.int64)).to(model.device)
        hidden, _ = model.hidden(ids[None])
        logprob, *_ = token_logprobs(hidden[0, :-1], model.head_weight, ids[1:])
        where = np.searchsorted(ends, np.arange(1, len(ids)), side="right")
        nats -= np.bincount(where, logprob.double().cpu().numpy(), minlength=len(ends))
        counts = np.bincount(where, minlength=len(ends))
        tokens += counts
        documents += counts > 0
        watch()
    mean = np.divide(nats, tokens, out=np.full(len(ends), np.nan), where=tokens > 0)
    return [
        {"from": begin, "to": end - 1, "nats": loss, "perplexity": float(np.exp(loss)), "tokens": n, "documents": d}
        for begin, end, loss, n, d in zip([1, *ends], ends, mean.tolist(), tokens.tolist(), documents.tolist(), strict=False)
    ]
