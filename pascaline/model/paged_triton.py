"""`attend_paged` in Triton: for each token and tile of its heads one pass over the row's blocks with a running softmax (FlashAttention,
arXiv 2205.14135). Where tokens are few their sequences are cut into parts, which are put together afterwards (flash-decoding).

Shapes as in paged.py.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pascaline.model.paged import heads_of_entries


class Tiles(NamedTuple):
    """What one program does at a time: `heads` queries against `positions` entries, by so many warps, with loads `stages` steps ahead."""

    heads: int
    positions: int
    warps: int
    stages: int


# From the widest: heads that share a tile read its entries once. 64 x 512 float32 sums fill half of the registers of 8 warps.
TILES = (Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(16, 64, 4, 3), Tiles(16, 32, 4, 2))
SMALL = Tiles(16, 16, 8, 1)  # float32, whose products are no tensor core's, has no registers for more
WAVES = 4  # programs a processor should get, so that the last ones do not keep the others waiting


# One compilation for whatever the batch is: its numbers and the alignment of its index tensors make no other code.
@triton.jit(do_not_specialize=["table_width"], do_not_specialize_on_alignment=["tables", "rows", "positions"])
def _attend(  # type: ignore[no-untyped-def]
    q, pool, tables, rows, positions, out, log_sums,
    scale,  # times log2 e
    table_width,
    H: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, POSITIONS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (token and tile of its heads, part of the sequence) -> out [n, parts, H, R], each part's own attention, and log_sums
    [n, parts, H], the base-2 logarithm of its weights' sum. A key is read as its first R numbers and the rest (512 + 64 of V3), FIRST and
    REST being the powers of two that hold them."""
    latent: tl.constexpr = WIDTH == C
    tiles: tl.constexpr = (GROUP + HEADS - 1) // HEADS  # of a group
    programs: tl.constexpr = H // GROUP * tiles
    token, tile = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    part, parts = tl.program_id(1), tl.num_programs(1)
    group = tile // tiles
    member = tile % tiles * HEADS + tl.arange(0, HEADS)
    head = group * GROUP + member
    first, rest = tl.arange(0, FIRST), tl.arange(0, REST)
    query = q + (token * H + head[:, None]) * C
    is_head, is_first, is_rest = member[:, None] < GROUP, first[None, :] < R, rest[None, :] < C - R
    q_first = tl.load(query + first[None, :], mask=is_head & is_first, other=0.0)
    if C > R:
        q_rest = tl.load(query + R + rest[None, :], mask=is_head & is_rest, other=0.0)

    length = tl.load(positions + token).to(tl.int32) + 1
    span = tl.cdiv(tl.cdiv(length, POSITIONS), parts) * POSITIONS
    stop = tl.minimum((part + 1) * span, length)
    table = tables + tl.load(rows + token).to(tl.int64) * table_width
    largest, total = tl.full([HEADS], float("-inf"), tl.float32), tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, FIRST], tl.float32)
    for at in tl.range(part * span, stop, POSITIONS, num_stages=STAGES):
        position = at + tl.arange(0, POSITIONS)
        seen = position < stop
        block = tl.load(table + position // BLOCK, mask=seen, other=0).to(tl.int64)
        entry = pool + (block * BLOCK + position % BLOCK)[:, None] * WIDTH
        key = entry + group * C
        k_first = tl.load(key + first[None, :], mask=seen[:, None] & is_first, other=0.0)
        scores = tl.dot(q_first, tl.trans(k_first), input_precision="ieee")
        if C > R:
            k_rest = tl.load(key + R + rest[None, :], mask=seen[:, None] & is_rest, other=0.0)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
        value = k_first
        if not latent:
            value = tl.load(entry + H // GROUP * C + group * R + first[None, :], mask=seen[:, None] & is_first, other=0.0)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - now_largest[:, None])
        keep = tl.exp2(largest - now_largest)
        total = total * keep + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * keep[:, None], input_precision="ieee")
        largest = now_largest

    # Where tables are wide and rows short, parts may have nothing to read: their weight is 0, and what they give is never read.
    at_out = (token * parts + part) * H + head
    total = tl.where(total == 0.0, 1.0, total)
    if part * span < stop:
        mixed = mixed / total[:, None]
        tl.store(out + at_out[:, None] * R + first[None, :], mixed.to(out.dtype.element_ty), mask=is_head & is_first)
    tl.store(log_sums + at_out, largest + tl.log2(total), mask=member < GROUP)


@triton.jit(do_not_specialize=["parts"])
def _unite(part_out, log_sums, out, parts, H: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (head, token): the parts' outputs by the sums of their weights; [n, parts, H, R] -> [n, H, R]. PARTS: parts that are
    read at a time."""
    head, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, some = tl.arange(0, FIRST), tl.arange(0, PARTS)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    mixed = tl.zeros([FIRST], tl.float32)
    for at in range(0, parts, PARTS):
        row = (token * parts + at + some) * H + head
        is_part = at + some < parts
        log_sum = tl.load(log_sums + row, mask=is_part, other=float("-inf"))
        is_read = (log_sum != float("-inf"))[:, None] & (first[None, :] < R)
        values = tl.load(part_out + row[:, None] * R + first[None, :], mask=is_read, other=0.0)
        now_largest = tl.maximum(largest, tl.max(log_sum, 0))
        weights, keep = tl.exp2(log_sum - now_largest), tl.exp2(largest - now_largest)
        total = total * keep + tl.sum(weights, 0)
        mixed = mixed * keep + tl.sum(weights[:, None] * values, 0)
        largest = now_largest
    tl.store(out + (token * H + head) * R + first, (mixed / total).to(out.dtype.element_ty), mask=first < R)


def attend_paged_triton(
    q_nHC: Tensor,
    pool: Tensor,
    tables_rW: Tensor,
    row_n: Tensor,
    position_n: Tensor,
    value_width: int,
    scale: float,
    tiles: Tiles | None = None,
    parts: int = 0,
) -> Tensor:
    """`paged.attend_paged`. tiles, parts: another division of the work than the usual one."""
    (n, H, C), (_, BLOCK, width), R = q_nHC.shape, pool.shape, value_width
    K = heads_of_entries(pool, C, R)
    first, rest = power_of_two(R), power_of_two(C - R)
    processors, memory = _device(q_nHC.device)
    read = first + rest if width == C else 2 * first + rest
    tiles = tiles or choose_tiles(H // K, first + rest, read, pool.element_size(), memory)
    programs = n * K * triton.cdiv(H // K, tiles.heads)
    parts = parts or choose_parts(programs, tables_rW.shape[1] * BLOCK, processors)
    q_nHC, pool = q_nHC.contiguous(), pool.contiguous()
    out = q_nHC.new_empty((n, H, R))
    part_out = out if parts == 1 else q_nHC.new_empty((n, parts, H, R), dtype=torch.float32)
    log_sums = q_nHC.new_empty((n, parts, H), dtype=torch.float32)
    with torch.cuda.device_of(q_nHC):  # Triton launches on the current device
        _attend[(programs, parts)](
            q_nHC, pool, tables_rW, row_n, position_n, part_out, log_sums, scale * 1.4426950408889634, tables_rW.stride(0),
            H, H // K, C, R, width, BLOCK, tiles.heads, tiles.positions, first, rest, tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip
        if parts > 1:
            _unite[(H, n)](part_out, log_sums, out, parts, H, R, first, 4)
    return out


def choose_tiles(group: int, query: int, entry: int, size: int, memory: int) -> Tiles:
    """The widest tiles for `group` heads on the same keys that fit into `memory` bytes of a program; query, entry: numbers held of a head's
    query and of a position, of `size` bytes each."""
    if size == 4:
        return SMALL
    widest = power_of_two(group)
    fitting = (t for t in TILES if t.heads <= widest and size * (t.heads * query + t.stages * t.positions * entry) <= memory)
    return next(fitting, SMALL)


def choose_parts(programs: int, positions: int, processors: int) -> int:
    """Into how many parts to cut sequences of up to `positions`: enough for every processor, and for WAVES of them where a part stays so
    long that its output is little beside what it reads."""
    return max(min(processors // programs, positions // 64), min(WAVES * processors // programs, positions // 1024), 1)


def power_of_two(width: int) -> int:
    """Numbers in a tile that holds `width`; a matrix product needs 16."""
    return max(triton.next_power_of_2(width), 16)


@lru_cache
def _device(device: torch.device) -> tuple[int, int]:
    """Processors, and bytes of shared memory that a program may have."""
    if device.type != "cuda":  # Triton's interpreter
        return 1, 1 << 18
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
