"""Which documents of a bad step are to blame."""

from pathlib import Path
from typing import Any

import torch

from pascaline.data.batch import Batch
from pascaline.model.transformer import Model
from pascaline.runs import Metrics, plain
from pascaline.train.losses import token_logprobs

Names = dict[tuple[int, int], dict[str, Any]]  # (row, document id in the row) -> what is known of the document
MOST = 20


def suspects(model: Model, batches: list[Batch], names: list[Names]) -> list[dict[str, Any]]:
    """The documents of a rank's batches with their mean loss in nats a token."""
    found = []
    for batch, known in zip(batches, names, strict=False):
        batch = batch.to(model.device)
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.document_ids)
        logprob, *_ = token_logprobs(hidden[:, :-1].flatten(0, 1), model.head_weight, batch.tokens[:, 1:].flatten())
        loss = -logprob.view(len(batch.tokens), -1)
        for (row, document), name in known.items():
            inside = (batch.document_ids[row, 1:] == document) & (batch.positions[row, 1:] > 0)
            if inside.any():
                found.append({**name, "loss": float(loss[row][inside].mean())})
    return found


def worst(found: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All ranks' documents, the worst first (one without a finite loss is the worst), at most MOST."""
    whole = [entry for own in found for entry in own]
    return sorted(whole, key=lambda entry: -entry["loss"] if entry["loss"] == entry["loss"] else -torch.inf)[:MOST]


def record(path: Path, entry: dict[str, Any]) -> None:
    """Append `entry` unless it stands there already, from before a resume."""
    if plain(entry) not in Metrics.read(path):
        with Metrics(path) as file:
            file.append(entry)
