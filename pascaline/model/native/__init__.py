"""The CPU's kernels for a step of the engine, beside the modules' own PyTorch forward (parity: tests).

What they add to speed is a promise: a token's numbers depend on that token's own inputs alone, bit for bit, whatever else is in the step,
in whichever order and on however many threads. Weights are read where the module has them; nothing is copied or repacked.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pascaline.model.config import ModelConfig
from pascaline.model.fused import rms_norm as rms_norm_torch
from pascaline.model.native.build import Building
from pascaline.model.native.plan import Plan, Step
from pascaline.model.rope import inverse_frequencies
from pascaline.model.rope import turns as turns_torch

Array = np.ndarray[Any, Any]
SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_lock = threading.Lock()
_building: Building | None = None
_library: ctypes.CDLL | None = None  # set when the build is done
_plans: "WeakKeyDictionary[nn.Module, Plan]" = WeakKeyDictionary()


class Pages(Protocol):
    """Pages of the cache and one step's n tokens, as engine/cache.py lays them out; all of it contiguous."""

    pool: Tensor  # [L, blocks, 16, C]
    tables_rW: Tensor  # int32
    row_n: Tensor  # int32
    position_n: Tensor  # int64
    slot_n: Tensor  # int64
    routes: Tensor | None  # [M, blocks, 16, K] int16: where the M layers with experts note those that they chose


def start() -> None:
    """Begin to build, or to load what was built before, in the background; at once if that was begun already."""
    global _building
    with _lock:
        if _building is None:
            _building = Building()


def wait(seconds: float | None = None) -> str:
    """Until the kernels are there, and taken, or known to lack; why they do, or ""."""
    start()
    assert _building is not None
    _building.thread.join(seconds)
    take()
    return lacking()


def take() -> bool:
    """Compute by the kernels from now on, if they have been built since; whether that is new. An engine says when: between answers, not
    within one, whose tokens would hang on when the compiler was done."""
    global _library
    if _library is not None or _building is None or _building.library is None:
        return False
    _library = _declared(_building.library)
    return True


def lacking() -> str:
    """Why PyTorch computes the engine's steps on this machine's CPU, in one line; "" if the kernels do."""
    if _library is not None:
        return ""
    return "no engine asked for the kernels yet" if _building is None else _building.lacking or "they are built and not taken yet"


def library() -> ctypes.CDLL | None:
    """The kernels, once they are taken."""
    return _library


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    at, number = ctypes.c_void_p, ctypes.c_int64
    arguments = {"turns": [at, at, ctypes.c_float, at, number, number], "draws": [at, at, number, number, *[at] * 8, number]}
    for suffix in SUFFIX.values():
        arguments[f"blocks_{suffix}"] = [number, at, at, at, number]
        arguments[f"linear_{suffix}"] = [*[at] * 4, *[number] * 4]
        arguments[f"norm_{suffix}"] = [at, at, at, number, number, ctypes.c_double, number]
    for name, types in arguments.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    return found


def _kernels(cache: Any, *tensors: Tensor | None) -> ctypes.CDLL | None:
    """The library, if these tensors of an engine's step can go through it."""
    if cache is None or torch.is_grad_enabled():
        return None
    dtype = tensors[0].dtype if tensors[0] is not None else None
    for t in tensors:
        if t is not None and not (t.dtype is dtype and t.device.type == "cpu" and t.is_contiguous()):
            return None
    return library() if dtype in SUFFIX else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, cache: Any = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed; by the kernels within a step of the engine (`cache` is its cache)."""
    kernels = _kernels(cache, x, weight, bias)
    if kernels is None:
        return F.linear(x, weight, bias)
    N, K = weight.shape
    out = x.new_empty(*x.shape[:-1], N)
    run = kernels.linear_float32 if x.dtype is torch.float32 else kernels.linear_bfloat16
    at = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
    run(*at, x.numel() // K, N, K, torch.get_num_threads())
    return out


def linear(module: nn.Linear, x: Tensor, cache: Any = None) -> Tensor:
    """module(x), as `product` where that is what it computes."""
    return product(x, module.weight, module.bias, cache) if type(module) is nn.Linear else module(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, cache: Any = None) -> Tensor:
    """RMSNorm over the last dim, by the kernels within a step of the engine."""
    kernels = _kernels(cache, x, weight)
    if kernels is None:
        return rms_norm_torch(x, weight, eps)
    out, D = torch.empty_like(x), x.shape[-1]
    run = kernels.norm_float32 if x.dtype is torch.float32 else kernels.norm_bfloat16
    run(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // D, D, eps, torch.get_num_threads())
    return out


def turns(config: ModelConfig, positions_BT: Tensor, cache: Any = None) -> Tensor:
    """rope.turns, [B, T, 1, P/2] complex, by the kernels within a step of the engine."""
    rope, dim = config.rope, config.rope_dim
    inverse = inverse_frequencies(rope, dim, positions_BT.device)
    kernels = _kernels(cache, inverse) if positions_BT.dtype is torch.long and positions_BT.is_contiguous() else None
    if kernels is None:
        return turns_torch(rope, dim, positions_BT)
    out = torch.empty(*positions_BT.shape, 1, dim // 2, dtype=torch.complex64)
    kernels.turns(positions_BT.data_ptr(), inverse.data_ptr(), rope.amplitude, out.data_ptr(), positions_BT.numel(), dim // 2)
    return out


def blocks(layers: Sequence[nn.Module], x_1nD: Tensor, turn: Tensor, cache: Any) -> Tensor | None:
    """Blocks that follow each other on n tokens of an engine's step, [1, n, D]; None where the modules must compute it
    themselves. `cache` has Pages, or is None."""
    if cache is None or torch.is_grad_enabled():
        return None
    kernels = library()
    if kernels is None:
        return None
    plan = _plans.get(layers[0])
    if plan is None or not plan.holds(layers):
        plan = _plans[layers[0]] = Plan(layers)
    if plan.dtype is not x_1nD.dtype or not x_1nD.is_contiguous() or turn.dtype is not torch.complex64:
        return None
    pages: Pages = cache
    out, pool = torch.empty_like(x_1nD), pages.pool
    stride = pool.stride(0) * pool.element_size()
    first = max(plan.layer - plan.config.first_k_dense_replace, 0)  # of the layers with experts
    routes = None if pages.routes is None or first >= len(pages.routes) else pages.routes[first]  # none of an MTP module
    step = Step(
        x_1nD.shape[1], torch.get_num_threads(), pages.tables_rW.shape[1], 0 if routes is None else routes.numel(), x_1nD.data_ptr(),
        turn.data_ptr(), out.data_ptr(), pool.data_ptr() + plan.layer * stride, pages.tables_rW.data_ptr(), pages.row_n.data_ptr(),
        pages.position_n.data_ptr(), pages.slot_n.data_ptr(), None if routes is None else routes.data_ptr(),
    )  # fmt: skip
    run = kernels.blocks_float32 if plan.dtype is torch.float32 else kernels.blocks_bfloat16
    run(len(layers), plan.shapes, plan.weights, ctypes.addressof(step), stride)
    return out


def draws(logits_nV: Tensor, cuts_4n: Array, seed_n: Array, position_n: Array, own_nV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """engine.sampler's tokens [n], of float32 logits on the CPU; cuts: temperature, top_p, min_p, top_k. And by `own_nV`, the model's own
    logits, their log-probabilities [n]; no numbers where those are none. The kernels must be there."""
    kernels = library()
    assert kernels is not None and logits_nV.is_contiguous() and (own_nV is None or own_nV.is_contiguous())
    (n, V), cuts = logits_nV.shape, np.ascontiguousarray(cuts_4n, np.float64)
    keys = np.ascontiguousarray(seed_n, np.uint64), np.ascontiguousarray(position_n, np.uint64)
    tokens, logprobs = torch.empty(n, dtype=torch.long), torch.empty(n)
    first = cuts.ctypes.data
    kernels.draws(
        logits_nV.data_ptr(), None if own_nV is None else own_nV.data_ptr(), n, V, *(first + 8 * n * i for i in range(4)),
        *(a.ctypes.data for a in keys), tokens.data_ptr(), logprobs.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return tokens, logprobs
