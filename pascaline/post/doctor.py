"""What a recipe needs on each of so many ranks, before any of them is started."""

from typing import Any

import torch

from pascaline.device import best_dtype
from pascaline.errors import BadInput
from pascaline.eval.forms import aligned
from pascaline.post.check import check_ranks, model_config
from pascaline.post.stage import TOGETHER
from pascaline.recipe import Recipe
from pascaline.runs import machine
from pascaline.tables import kind
from pascaline.train.memory import Plan, peak

KINDS = ("weights", "moments", "gradients", "gathered", "activations", "logits", "temporary", "peak", "host copy", "start")
PER_HOST = 8  # devices of a machine, if it is not told


def needs(recipe: Recipe, ranks: int, per_host: int | None = None, memory: float | None = None) -> dict[str, Any]:
    """Bytes of each kind for each training stage, per device and host, whether they fit into `memory` GiB of a device (default: this
    machine's), and what would save how much. BadInput for a mesh that does not fit the recipe."""
    check_ranks(recipe, ranks)
    cuda = recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available())
    dtype = recipe.dtype if recipe.dtype != "auto" else "bfloat16" if cuda else str(best_dtype("cpu")).removeprefix("torch.")
    plans = {name: plan(recipe, name, ranks, getattr(torch, dtype).itemsize, not cuda) for name in recipe.models}
    stages = {name: peak(one) for name, one in plans.items()}
    each = min(per_host or (ranks if not cuda else PER_HOST), ranks)
    device = max(kinds["peak"] for kinds in stages.values())
    host = each * max(max(kinds["host copy"] + (0 if cuda else kinds["peak"]), kinds["start"]) for kinds in stages.values())
    room = memory * 2**30 if memory else _room(cuda, each)
    return {
        "ranks": ranks, "replicas": recipe.parallel.replicas, "experts": recipe.parallel.experts, "device": "cuda" if cuda else "cpu",
        "dtype": dtype, "ranks_per_host": each,
        "stages": stages, "device_bytes": device, "host_bytes": host, "room_bytes": room,
        "fits": None if room is None else (device if cuda else host // each) <= room, "savings": _savings(recipe, plans, stages),
    }  # fmt: skip


def plan(recipe: Recipe, name: str, ranks: int, size: int, host: bool) -> Plan:
    """Stages that one rank does alone have no others to share with."""
    config, stage, mesh = model_config(recipe, recipe.tokenizer.vocab_size), getattr(recipe, name), recipe.parallel
    if kind(name) not in TOGETHER:
        return Plan(config, stage, size=size, host=host)
    return Plan(config, stage, ranks, mesh.experts, size, host, mesh.replicas)


def _room(cuda: bool, each: int) -> float | None:
    """Bytes of a device here, or of a rank's part of this host's memory; None where it is not known."""
    if cuda:
        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    gib = machine()["memory_gib"]
    return gib * 2**30 / each if gib else None


def _savings(recipe: Recipe, plans: dict[str, Plan], stages: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """What changes of the hungriest stage would save, in bytes of its peak, the largest first."""
    name = max(stages, key=lambda one: stages[one]["peak"])
    one = plans[name]
    changes: dict[str, tuple[dict[str, Any], int]] = {}
    if not one.stage.activation_checkpointing:
        changes[f"{name}.activation_checkpointing = true"] = ({"activation_checkpointing": True}, one.ranks)
    if one.rows > 1:
        half = one.rows // 2 * one.row
        changes[f"{name}.micro_tokens = {half}"] = ({"micro_tokens": half}, one.ranks)
    if name in TOGETHER:
        changes[f"{2 * one.ranks} ranks"] = ({}, 2 * one.ranks)
    out = []
    for change, (update, ranks) in changes.items():
        try:
            if ranks != one.ranks:
                check_ranks(recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"ranks": 0})}), ranks)
        except BadInput:
            continue
        other = Plan(one.config, one.stage.model_copy(update=update), ranks, one.experts, one.size, one.host, one.replicas)
        out.append({"change": change, "bytes": stages[name]["peak"] - peak(other)["peak"]})
    return sorted(out, key=lambda saving: -saving["bytes"])


def text(found: dict[str, Any]) -> str:
    """`needs` to be read."""
    names = list(found["stages"])
    rows = [["on each rank", *names]] + [[kind, *(size(found["stages"][name][kind]) for name in names)] for kind in KINDS]
    place = "a device" if found["device"] == "cuda" else "a rank"
    mesh = [f"{found['replicas']} replicas"] * (found["replicas"] > 1)
    mesh += [f"experts shared out among {found['experts']}"] * (found["experts"] > 1)
    lines = [
        f"{found['ranks']} rank{'s' * (found['ranks'] > 1)}{', '.join(['', *mesh])}; {found['device']}, {found['dtype']}",
        "",
        aligned(rows),
        "",
    ]
    lines.append(f"{place} needs {size(found['device_bytes'])}, a host with {found['ranks_per_host']} of them {size(found['host_bytes'])}")
    if found["fits"] is not None:
        lines.append(f"{place} has {size(found['room_bytes'])}: it {'fits' if found['fits'] else 'does not fit'}")
    lines += [f"{saving['change']} would save {size(saving['bytes'])}" for saving in found["savings"] if saving["bytes"] > 0]
    return "\n".join(lines)


def size(number: float) -> str:
    """1.5 GiB, three digits."""
    for unit, letters in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if number >= unit:
            return f"{number / unit:.3g} {letters}" if number < 1000 * unit else f"{number / unit:.0f} {letters}"
    return f"{number / 2**10:.3g} KiB"
