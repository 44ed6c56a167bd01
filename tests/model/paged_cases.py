"""Random blocks, tables and queries for the tests of paged attention; as a program (under TRITON_INTERPRET=1) it runs the Triton kernel on
them and prints {case: relative error against the plain form}."""

import json
import os
from typing import Any

import torch
from tiny import relative_error
from torch import Tensor

BLOCK = 16
# heads, groups (0: latent), numbers a query, numbers a value, positions of each row
SHAPES: dict[str, tuple[int, int, int, int, list[int]]] = {
    "latent": (2, 0, 16, 12, [1, 16, 17, 75]),
    "latent without a rotary part": (2, 0, 24, 24, [40]),
    "V3": (128, 0, 576, 512, [37, 9]),
    "grouped": (6, 2, 20, 20, [1, 33, 70]),
    "one query a head": (3, 3, 8, 8, [19]),
    "values narrower than keys": (4, 2, 24, 16, [50]),
    "more heads than a tile": (38, 2, 8, 8, [21]),
}


def case(name: str, dtype: torch.dtype, device: str = "cpu", tokens: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, float]:
    """The arguments of attend_paged: some tokens of each row, its last one among them, in no order. The second row begins with the first
    row's first block if both have one to share. What no row holds is NaN."""
    heads, groups, key, value, lengths = SHAPES[name]
    draw = torch.Generator().manual_seed(len(name))
    widest = -(-max(lengths) // BLOCK)
    order = (torch.randperm(len(lengths) * widest, generator=draw) + 1).view(-1, widest).int()
    order = torch.cat((order, torch.zeros_like(order)), 1)  # tables are wider than their rows are long
    if len(lengths) > 1 and min(lengths[:2]) >= BLOCK:
        order[1, 0] = order[0, 0]
    pool = torch.full((int(order.max()) + 1, BLOCK, groups * (key + value) or key), torch.nan)
    for table, length in zip(order, lengths, strict=True):
        for position in range(length):
            pool[table[position // BLOCK], position % BLOCK] = torch.randn(pool.shape[-1], generator=draw)
    row = torch.arange(len(lengths)).repeat_interleave(tokens)
    length = torch.tensor(lengths)[row]
    position = (torch.rand(len(row), generator=draw) * length).long()
    position[::tokens] = length[::tokens] - 1
    shuffle = torch.randperm(len(row), generator=draw)
    q = 2 * torch.randn(len(row), heads, key, generator=draw)
    row, position = row[shuffle].int(), position[shuffle].int()
    arguments: Any = (tensor.to(device) for tensor in (q.to(dtype), pool.to(dtype), order, row, position))
    return *arguments, value, key**-0.5


def main() -> None:
    from pascaline.model.paged import attend_paged_plain
    from pascaline.model.paged_triton import Tiles, attend_paged_triton

    assert os.environ["TRITON_INTERPRET"] == "1"
    found = {}
    for name in SHAPES:
        for dtype in (
            (torch.float32, torch.float16) if name in ("latent", "grouped", "V3") else (torch.float32,)
        ):  # in bf16 it has no products
            for parts in (1, 5):
                arguments = case(name, dtype)
                expected = attend_paged_plain(*arguments)
                out = attend_paged_triton(*arguments, tiles=Tiles(64 if name == "V3" else 16, 32, 4, 2), parts=parts)
                assert out.dtype == dtype and out.shape == expected.shape
                found[f"{name}, {str(dtype)[6:]}, {parts} parts"] = relative_error(out, expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
