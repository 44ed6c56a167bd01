"""MQAR, multi-query associative recall (Zoology, arXiv 2312.04927, section 3.2), of a trained model in its own tokens, as a suite's task.

A text of random tokens: K keys, each with its value after it; then every key once more, and what follows is to be its value. The model
reads it once, with the right value after each key (teacher forcing), and is right where its likeliest token of the whole vocabulary is
the value. Nothing is generated and nothing is trained for it, other than in Zoology.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pascaline.engine import Engine
from pascaline.errors import BadInput, describe_validation
from pascaline.eval import needle, passk
from pascaline.eval.plan import Plan, measured
from pascaline.model.transformer import Model
from pascaline.tables import Table
from pascaline.tokenizer import Tokenizer

SHORTEST, LONGEST = 64, 4096  # tokens, where no lengths are given; the paper's are 64 to 512
BATCH = 4096  # tokens read at a time, or one text
Ids = NDArray[np.int64]


class Dials(Table):
    """lengths: tokens of a text; none: the powers of two from 64 to 4,096 that the model has positions for. pairs: K. alpha: of the power
    law of the gaps, p(g) ~ g^(alpha - 1), 0.01 as in Zoology's code; 1: all alike."""

    lengths: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    pairs: list[Annotated[int, Field(ge=1)]] = Field([4, 8, 16, 32, 64], min_length=1)
    alpha: float = Field(0.01, gt=0, le=1)


@dataclass(frozen=True)
class Text:
    """ids [T]; at [K]: where the keys stand the second time; values [K]: what follows each."""

    ids: Ids
    at: Ids
    values: Ids


def mqar(engine: Engine, plan: Plan, watch: Callable[[int, int], None]) -> dict[str, Any]:
    """Recall of max(1, plan.problems // cells) texts in each cell of lengths x pairs; a text's value is the mean of its queries.

    Beside it `among`: right where the likeliest of the text's own K values is the one, for which `chance` is 1/K. Cells that do not fit
    into the model or its vocabulary are left_out, and why.
    """
    if engine.tokenizer is None:
        raise BadInput(f"'{plan.task}' draws tokens of text, and this engine has no tokenizer.")
    dials, config = _dials(plan), engine.model.config
    begin, tokens = engine.tokenizer.prefix, plain_tokens(engine.tokenizer, config.vocab_size)
    default = [SHORTEST << i for i in range(7) if SHORTEST << i <= min(LONGEST, config.max_position_embeddings)]
    wanted = [(length, pairs) for length in sorted(set(dials.lengths)) or default for pairs in sorted(set(dials.pairs))]
    left_out = {f"{length} x {pairs}": why for length, pairs in wanted if (why := _misfit(length, pairs, config, len(begin), len(tokens)))}
    fitting = [(length, pairs) for length, pairs in wanted if f"{length} x {pairs}" not in left_out]
    each = max(1, plan.problems // max(1, len(fitting)))
    values, keys, among, cells, chance = list[float](), list[str](), list[float](), list[dict[str, Any]](), list[float]()
    for done, (length, pairs) in enumerate(fitting):
        rng = np.random.default_rng([plan.seed, length, pairs])
        texts = [write(tokens, begin, length, pairs, dials.alpha, rng) for _ in range(each)]
        anything, own = recall(engine.model, texts)
        cells.append({"length": length, "pairs": pairs, **needle.mean(anything), "among": float(np.mean(own)), "chance": 1 / pairs})
        values, among, chance = values + anything, among + own, chance + [1 / pairs] * each
        keys += [f"mqar {length} {pairs} {i}" for i in range(each)]
        watch((done + 1) * each, len(fitting) * each)
    mean, low, high = passk.mean_interval(among) if among else (None, None, None)
    return measured(
        values, keys, cells=cells, among={"score": mean, "low": low, "high": high, "chance": float(np.mean(chance)) if chance else None},
        alpha=dials.alpha, tokens=len(tokens), left_out=left_out,
    )  # fmt: skip


def plain_tokens(own: Tokenizer, size: int) -> Ids:
    """Ids below `size` that stand for printable text with more in it than blanks: no special tokens, no pieces of a character."""
    return np.array([i for i in range(min(own.vocab_size, size)) if not own.is_special(i) and _is_text(own.piece(i))], np.int64)


def write(tokens: Ids, begin: Sequence[int], length: int, pairs: int, alpha: float, rng: np.random.Generator) -> Text:
    """A text of `length` tokens (one less where that is odd after `begin`): begin, the pairs, then places of two tokens each.

    A query is a key in such a place with its value behind it. Its place is drawn, none twice, with p(g) ~ g^(alpha - 1), where g counts the
    places from the end of the pairs (Zoology's multiquery_ar.py). Keys, values and the noise in the other places are of `tokens`, drawn
    evenly; no key or value comes a second time but in its query, so that noise asks nothing (Zoology's may).
    """
    chosen = rng.choice(tokens, 2 * pairs, replace=False)
    pairs_K2 = chosen.reshape(pairs, 2)
    places = (length - len(begin) - 2 * pairs) // 2
    likely = np.arange(1, places + 1, dtype=np.float64) ** (alpha - 1)
    where = rng.permutation(rng.choice(places, pairs, replace=False, p=likely / likely.sum()))
    tail_P2 = rng.choice(np.setdiff1d(tokens, chosen), (places, 2)) if places > pairs else np.zeros((places, 2), np.int64)
    tail_P2[where] = pairs_K2
    ids = np.concatenate([np.array(begin, np.int64), pairs_K2.ravel(), tail_P2.ravel()])
    return Text(ids, len(begin) + 2 * pairs + 2 * where, pairs_K2[:, 1])


@torch.no_grad()
def recall(model: Model, texts: Sequence[Text]) -> tuple[list[float], list[float]]:
    """Of each text (all of one length), the share of its queries whose value is the likeliest token of the vocabulary, and the share
    whose value is the likeliest of the text's values."""
    anything, own = list[float](), list[float]()
    batch = max(1, BATCH // len(texts[0].ids))
    for begin in range(0, len(texts), batch):
        some = texts[begin : begin + batch]
        hidden_BTD, _ = model.hidden(torch.from_numpy(np.stack([text.ids for text in some])).to(model.device))
        for text, hidden_TD in zip(some, hidden_BTD, strict=True):
            logits_KV = model.head(hidden_TD[torch.from_numpy(text.at).to(model.device)]).float()
            values = torch.from_numpy(text.values).to(model.device)
            anything.append(float((logits_KV.argmax(-1) == values).double().mean()))
            own.append(float((values[logits_KV[:, values].argmax(-1)] == values).double().mean()))
    return anything, own


def _misfit(length: int, pairs: int, config: Any, begin: int, tokens: int) -> str:
    """Why a cell cannot be measured; "" if it can."""
    if length > config.max_position_embeddings:
        return f"the model has {config.max_position_embeddings:,} positions"
    if begin + 4 * pairs > length:
        return f"{pairs} pairs and their queries take {begin + 4 * pairs} tokens"
    return f"the vocabulary has {tokens} tokens of text" if 2 * pairs >= tokens else ""


def _is_text(piece: bytes) -> bool:
    text = piece.decode("utf-8", "replace")
    return bool(text.strip()) and text.isprintable() and "\ufffd" not in text


def _dials(plan: Plan) -> Dials:
    try:
        return Dials.model_validate(plan.dials)
    except ValidationError as error:
        raise BadInput(describe_validation(error, f"dials of '{plan.task}'", Dials.model_fields)) from None
