"""How well a model predicts text: held-out text by the position of the token, and texts of a file as a task of a suite."""

import math
import random
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from pascaline.data.sources import documents
from pascaline.engine import Engine
from pascaline.errors import BadInput
from pascaline.eval.plan import Plan, measured
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


@torch.no_grad()
def document_nats(model: Model, ids: Sequence[int], length: int) -> float:
    """Loss of all tokens of a text but the first, in nats, in windows of at most `length` tokens, of which each begins with the last token
    of the one before."""
    nats = 0.0
    for start in range(0, len(ids) - 1, length - 1):
        window = torch.tensor(ids[start : start + length], device=model.device)
        hidden, _ = model.hidden(window[None])
        logprob, *_ = token_logprobs(hidden[0, :-1], model.head_weight, window[1:])
        nats -= float(logprob.double().sum())
    return nats


def perplexity(engine: Engine, plan: Plan, watch: Callable[[int, int], None]) -> dict[str, Any]:
    """The task `ppl:FILE`: bits per byte of each text (at most plan.problems of them, in a seeded order; a .txt, .md or .py is cut into
    pieces as in a corpus), which does not depend on the tokenizer as perplexity does. Beside it bits_per_byte over all texts, nats per
    token (`nats`) and `perplexity`, e to its power, for models of one tokenizer; tokens, bytes.

    A text begins with the tokenizer's begin token; without one its first token is predicted by nothing, and its bytes do not count.
    """
    own, model = engine.tokenizer, engine.model
    if own is None:
        raise BadInput(f"task '{plan.task}' reads text, and this engine has no tokenizer.")
    texts = list(documents([plan.argument], None, lambda _: None))
    random.Random(plan.seed).shuffle(texts)
    values, keys, nats, tokens, size = list[float](), list[str](), 0.0, 0, 0
    for number, text in enumerate(texts[: plan.problems], 1):
        ids = own.encode(text.text)
        count = len(text.text.encode()) - (0 if own.prefix else len(own.piece(ids[0], first=True)))
        if count:
            loss = document_nats(model, [*own.prefix, *ids], model.config.max_position_embeddings)
            values.append(loss / math.log(2) / count)
            keys.append(f"{text.id} {blake2b(text.text.encode(), digest_size=8).hexdigest()}")
            nats, tokens, size = nats + loss, tokens + len(ids) - (not own.prefix), size + count
        watch(number, min(len(texts), plan.problems))
    if not values:
        raise BadInput(f"task '{plan.task}': {plan.argument} holds no text to predict.")
    facts = {"bits_per_byte": nats / math.log(2) / size, "nats": nats / tokens, "perplexity": math.exp(nats / tokens)}
    return measured(values, keys, "lower", "bits/byte", **facts, texts=len(values), of=len(texts), tokens_read=tokens, bytes=size)
