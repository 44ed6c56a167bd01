"""What a step's row of metrics.jsonl is made of, in which order, and what of it the progress line shows."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pascaline.train import losses
from pascaline.train.parallel import Ranks

# Of a step of reinforcement first what tells how it goes; its loss, which tells nothing (trl#2703), last.
FIRST = ("alarms", "reward", "flat_groups", "all_right", "none_right", "entropy", "reference_kl", "ratio", "ratio_max", "clipped",
         "mismatch", "gap_max", "response_tokens", "tokens_right", "tokens_wrong", "truncated", "accuracy", "wrong", "abstain", "unjudged",
         "rollout_tokens_per_s", "update_tokens_per_s", "rollout_seconds", "verify_seconds", "update_seconds", "other")  # fmt: skip
LAST = (*losses.PARTS, "loss")
BESIDE = ("gemm_share", "mfu", "grad_norm", "max_violation", "dead_experts", "slowest_per_median")
SHOWN = ("loss", "tokens_per_s", *BESIDE)
SHOWN_OF_RL = ("reward", "flat_groups", "entropy", "reference_kl", "ratio_max", "clipped", "gap_max", "response_tokens", "truncated",
               "accuracy", "rollout_tokens_per_s", "update_tokens_per_s", "other", *BESIDE, "loss")  # fmt: skip


class Watch(Protocol):
    """Judges rows as they come, from rows alone, so that a resumed run hears the same."""

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """The rows that stand so far."""

    def look(self, row: dict[str, Any]) -> tuple[list[str], list[str], str]:
        """What is wrong by now (names), what to say about it once, and why to stop, or ""."""


def combined(name: str, a: Tensor, b: Tensor) -> Tensor:
    """A value of two micro-batches: shares add up, but of what is called NAME_max the larger one counts."""
    return torch.maximum(a, b) if name.endswith("_max") else a + b


def over_ranks(ranks: Ranks, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of all ranks, combined in the same way."""
    found: dict[str, Tensor] = {}
    for largest, reduce in ((False, ranks.sum), (True, ranks.max)):
        own = {name: value for name, value in values.items() if name.endswith("_max") == largest}
        if own:
            flat = reduce(torch.cat([value.flatten().float() for value in own.values()]))
            parts = flat.split([value.numel() for value in own.values()])
            found |= {name: part.view(value.shape) for (name, value), part in zip(own.items(), parts, strict=True)}
    return found


def read(row: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """The row of a step whose values have arrived."""
    load_LE = told.pop("load", [])
    row = {**row, **told} if told else {**row, "loss": 0.0, "skipped": True}
    if "router_entropy" in row:
        row["router_entropy"] = [round(entropy, 4) for entropy in row["router_entropy"]]
    if load_LE:
        share_LE = [[count / sum(layer) for count in layer] for layer in load_LE]
        row["max_violation"] = max(share * len(layer) for layer in share_LE for share in layer) - 1  # MaxVio of arXiv 2408.15664
        row["dead_experts"] = sum(layer.count(0) for layer in load_LE)
        row["expert_load"] = [[round(share, 4) for share in layer] for layer in share_LE]
    return row


def spent(row: Mapping[str, Any], seconds: float, update: float) -> dict[str, Any]:
    """Where a step of `seconds` went, of a source that tells rollout_seconds and verify_seconds. update: seconds from its batches to the
    new weights; what the source itself has counted as such comes on top. other: the share that is none of the three."""
    update += row.get("update_seconds", 0.0)
    known = row["rollout_seconds"] + row.get("verify_seconds", 0.0) + update
    told = {"update_seconds": update, "other": max(1 - known / seconds, 0.0)}
    if row["rollout_seconds"] and row.get("rollout_tokens"):
        told["rollout_tokens_per_s"] = row["rollout_tokens"] / row["rollout_seconds"]
    if row["tokens"]:
        told["update_tokens_per_s"] = row["tokens"] / update
    return told


def ordered(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same row, FIRST first and LAST last if it is one of reinforcement."""
    if "reward" not in row:
        return dict(row)
    ends = {key: row[key] for key in LAST if key in row}
    begins = {key: row[key] for key in ("step", *FIRST) if key in row}
    return begins | {key: value for key, value in row.items() if key not in ends} | ends


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the progress line says of a row, in its order."""
    told = {key: row[key] for key in (SHOWN_OF_RL if "reward" in row else SHOWN) if key in row}
    return {"alarms": ", ".join(row["alarms"]), **told} if row.get("alarms") else told
