"""Tokens per second of a full optimizer step against transformers, same configuration, weights and batch; each side in its best dtype.

Ours: float32 master weights, gradient clipping, router balancing. Theirs: plain weights in the dtype, fused AdamW, no clipping.
"""

from collections.abc import Callable

import torch
from _common import CONFIG, DTYPES, alternate, arguments, best, finish, twins

from pascaline.data.batch import Batch
from pascaline.device import measure
from pascaline.tables import Stage
from pascaline.train import losses
from pascaline.train.loop import active_parameters
from pascaline.train.optim import Optimizer

ROWS, LENGTH = 16, 256


def ours(dtype: torch.dtype, tokens: torch.Tensor) -> Callable[[], int]:
    model, _ = twins()
    optimizer = Optimizer(model, Stage(), dtype)
    routers = model.routers()
    batch = Batch(tokens, torch.arange(LENGTH).expand(ROWS, LENGTH), torch.zeros_like(tokens), {"ce": torch.ones(ROWS, LENGTH)})
    total = losses.totals([batch])

    def step() -> int:
        loss, _, loads = losses.compute(model, batch, total, losses.Loss())
        loss.backward()
        optimizer.collect()
        optimizer.step(1e-3, optimizer.norm())
        for router, load in zip(routers, loads, strict=True):
            router.balance(load, 1e-3)
        return tokens.numel()

    return step


def theirs(dtype: torch.dtype, tokens: torch.Tensor) -> Callable[[], int]:
    _, make = twins()
    model = make(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def step() -> int:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens.numel()

    return step


def main() -> None:
    options = arguments(__doc__ or "", rounds=5)
    tokens = torch.randint(0, CONFIG.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    makers = {"pascaline": ours, "transformers": theirs}
    rates = alternate(
        {f"{who} {name}": make(dtype, tokens) for name, dtype in DTYPES.items() for who, make in makers.items()}, options.rounds, 3.0
    )
    (mine, fast), (peer, slow) = best(rates, "pascaline"), best(rates, "transformers")
    model, _ = twins()
    peak = measure()[mine.split()[1]] * 1e9
    finish(
        {
            "ratio": fast / slow,
            "tokens_per_s": {"pascaline": fast, "transformers": slow},
            "gemm_share": 6 * active_parameters(model) * fast / peak,
            "best": {"pascaline": mine, "transformers": peer},
            "rounds": {name: [round(r) for r in values] for name, values in rates.items()},
        },
        options.json,
    )


if __name__ == "__main__":
    main()
