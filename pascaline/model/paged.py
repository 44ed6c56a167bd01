"""Attention to entries that lie in blocks of a pool, as the engine keeps them: the plain form, and which form runs where.

Shapes: n tokens, H heads of queries in K groups, C numbers a query, R numbers a value; a layer's pool [blocks, BLOCK, width] holds for each
position either one entry that is key (all C) and value (its first R) of every head, width = C, or K keys and then K values,
width = K (C + R). W block ids a row of `tables_rW`; token i reads positions 0..position_n[i] of row row_n[i].
"""

from functools import lru_cache

import torch
from torch import Tensor


def attend_paged(
    q_nHC: Tensor, pool: Tensor, tables_rW: Tensor, row_n: Tensor, position_n: Tensor, value_width: int, scale: float
) -> Tensor:
    """Softmax attention, [n, H, R] in the queries' dtype, added up in float32. By the Triton kernel where there is one (`lacking`)."""
    if lacking(q_nHC.device):
        return attend_paged_plain(q_nHC, pool, tables_rW, row_n, position_n, value_width, scale)
    from pascaline.model.paged_triton import attend_paged_triton

    return attend_paged_triton(q_nHC, pool, tables_rW, row_n, position_n, value_width, scale)


def attend_paged_plain(
    q_nHC: Tensor, pool: Tensor, tables_rW: Tensor, row_n: Tensor, position_n: Tensor, value_width: int, scale: float
) -> Tensor:
    """The same with every row's entries gathered, [n, W * BLOCK, width] of them."""
    n, H, C = q_nHC.shape
    K = heads_of_entries(pool, C, value_width)
    entries_nSE = pool[tables_rW[row_n].long()].flatten(1, 2).float()
    later_nS = torch.arange(entries_nSE.shape[1], device=pool.device) > position_n.unsqueeze(1)
    entries_nSE = entries_nSE.masked_fill(later_nS.unsqueeze(-1), 0.0)  # what nobody wrote may be NaN, and 0 NaN is no 0
    keys_nSKC = entries_nSE[..., : K * C].unflatten(-1, (K, C))
    values_nSKR = (entries_nSE[..., :value_width] if pool.shape[-1] == C else entries_nSE[..., K * C :]).unflatten(-1, (K, value_width))
    scores_nKGS = torch.einsum("nkgc,nskc->nkgs", q_nHC.float().view(n, K, H // K, C), keys_nSKC) * scale
    weights_nKGS = scores_nKGS.masked_fill(later_nS[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("nkgs,nskr->nkgr", weights_nKGS, values_nSKR).reshape(n, H, value_width).to(q_nHC.dtype)


def heads_of_entries(pool: Tensor, key_width: int, value_width: int) -> int:
    """K: how many heads of keys an entry has."""
    return 1 if pool.shape[-1] == key_width else pool.shape[-1] // (key_width + value_width)


@lru_cache
def lacking(device: torch.device) -> str:
    """Why this device has no kernel for it; "" where it has one, and a right one: tried once, against the plain form."""
    if device.type != "cuda":
        return f"{device.type} has no kernel for it"
    try:
        from pascaline.model.paged_triton import attend_paged_triton
    except ImportError as e:
        return f"triton cannot be imported ({e})"
    draw = torch.Generator(device).manual_seed(0)
    tables = torch.arange(1, 9, dtype=torch.int32, device=device).view(2, 4)
    row, position = (torch.tensor(ids, dtype=torch.int32, device=device) for ids in ([0, 1, 1], [63, 0, 37]))
    for heads, key, value, width in ((32, 576, 512, 576), (8, 64, 64, 256)):
        q, pool = (torch.randn(size, generator=draw, device=device).bfloat16() for size in ((3, heads, key), (9, 16, width)))
        case = q, pool, tables, row, position, value, key**-0.5
        try:
            found = attend_paged_triton(*case)
        except Exception as e:  # compilers, drivers and libraries each raise their own; without the kernel all goes on
            return f"the Triton kernel does not run ({type(e).__name__}: {next(iter(str(e).strip().splitlines()), '')})"
        expected = attend_paged_plain(*case)
        if not (found - expected).abs().max() <= 0.02 * expected.abs().max():
            return "the Triton kernel gives another result"
    return ""
