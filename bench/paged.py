"""The Triton kernel of paged attention on CUDA at DeepSeek-V3's dimensions (128 heads on one entry of 512 + 64 numbers, bf16): what one
layer of a decode step reads and writes a second, over the measured bandwidth of a copy, and against the plain PyTorch form. Its arithmetic
is told beside it: 128 heads do 242 operations for each byte, so that 70 % of the copy's bandwidth is half of an H100's peak in products.

--tiles tries every size of tiles instead of the chosen one; the calls take turns between tables, so that no cache holds what they read.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _common import finish
from torch import Tensor

from pascaline.device import choose
from pascaline.model.paged import attend_paged_plain, lacking

HEADS, KEY, VALUE, BLOCK = 128, 576, 512, 16
BATCHES, CONTEXTS = (1, 8, 32, 128), (1024, 4096, 16384, 32768)
CACHES = 256 << 20  # bytes that two calls on the same table should lie apart
PLAIN = 8 << 30  # bytes that the plain form may gather in float32


def seconds(calls: list[Callable[[], Any]], rounds: int) -> float:
    """Of one call, the median over the rounds; in a round the calls follow each other, so that the device never waits for Python alone."""
    times = []
    for round in range(rounds + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for call in calls:
            call()
        ended.record()
        ended.synchronize()
        if round:  # the first one compiles
            times.append(began.elapsed_time(ended) / 1000 / len(calls))
    return statistics.median(times)


def copy_rate(device: torch.device, rounds: int) -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)] * 4, rounds)


def product_rate(device: torch.device, rounds: int) -> float:
    """Operations a second of a bf16 matrix product."""
    a = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=device)
    return 2 * 8192**3 / seconds([lambda: a @ a] * 4, rounds)


def cases(batch: int, context: int, pool: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float]]:
    """Arguments of attend_paged for `batch` rows of `context` positions in blocks in no order; as many cases as lie apart in the pool, at
    least two."""
    device, wide, draw = pool.device, context // BLOCK, torch.Generator().manual_seed(0)
    q = torch.randn(batch, HEADS, KEY, generator=draw).to(device, torch.bfloat16)
    row = torch.arange(batch, dtype=torch.int32, device=device)
    position = torch.full_like(row, context - 1)
    count = max(CACHES // (batch * context * KEY * 2), 1) + 1
    tables = torch.randperm(len(pool) - 1, generator=draw).int().add_(1)
    tables = tables.repeat(-(-count * batch * wide // len(tables)))[: count * batch * wide].view(count, batch, wide).to(device)
    return [(q, pool, table, row, position, VALUE, KEY**-0.5) for table in tables]


def measure(batch: int, context: int, pool: Tensor, rates: tuple[float, float], options: argparse.Namespace) -> dict[str, Any]:
    from pascaline.model.paged_triton import TILES, attend_paged_triton

    some = cases(batch, context, pool)
    read = batch * context * KEY * 2 + batch * HEADS * (KEY + VALUE) * 2
    work = batch * context * HEADS * (KEY + VALUE) * 2
    found: dict[str, Any] = {}
    for tiles in TILES if options.tiles else (None,):
        try:
            took = seconds([partial(attend_paged_triton, *case, tiles=tiles) for case in some], options.rounds)
        except Exception as e:  # of a size that this GPU has no room for
            found[str(tuple(tiles or ()))] = {"error": str(e).splitlines()[0]}
            continue
        row = {"us": 1e6 * took, "bytes_per_s": read / took, "of_copy": read / took / rates[0], "of_product": work / took / rates[1]}
        if tiles is None and batch * context * KEY * 4 <= PLAIN:
            row["plain_over_kernel"] = seconds([partial(attend_paged_plain, *some[0])] * 2, options.rounds) / took
        found[str(tuple(tiles or ()))] = row
    return found if options.tiles else found["()"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiles", action="store_true", help="try every size of tiles")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench paged measures a kernel for CUDA, and there is no CUDA device here: nothing to measure.")
        return
    device = choose("cuda")
    if why := lacking(device):
        print(f"bench paged: no kernel on {torch.cuda.get_device_name(device)}: {why}.")
        return
    rates = copy_rate(device, options.rounds), product_rate(device, options.rounds)
    free = torch.cuda.mem_get_info(device)[0]
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "copy_bytes_per_s": rates[0], "product_flops": rates[1]}
    blocks = min(max(BATCHES) * max(CONTEXTS), int(0.5 * free) // (KEY * 2)) // BLOCK
    pool = torch.randn(blocks + 1, BLOCK, KEY, dtype=torch.bfloat16, device=device)
    for batch in BATCHES:
        for context in CONTEXTS:
            if batch * context > blocks * BLOCK:
                continue  # rows would share blocks, and the cache would read them for us
            name = f"{batch} x {context}"
            result[name] = measure(batch, context, pool, rates, options)
            if not options.json:
                for tiles, row in result[name].items() if options.tiles else [("", result[name])]:
                    print(name, tiles, {key: float(f"{v:.3g}") if isinstance(v, float) else v for key, v in row.items()})
    finish(result if options.json else {}, options.json)


if __name__ == "__main__":
    main()
