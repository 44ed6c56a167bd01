"""The engine's CPU kernels against PyTorch's: products of the measured model's shapes in GFLOP/s; and decode steps in milliseconds."""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from _common import CONFIG, DTYPES, arguments, finish, twins

from pascaline.engine.cache import Batch
from pascaline.model import native

SHAPES = ((480, 256), (256, 768), (4096, 256))  # N, K
TOKENS = (1, 4, 32, 128, 512)
CONTEXT = 64


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The least of some rounds of 10 ms at least."""
    work()
    times = []
    for _ in range(rounds):
        began, done = time.perf_counter(), 0
        while time.perf_counter() < began + 0.01:
            work()
            done += 1
        times.append((time.perf_counter() - began) / done)
    return min(times)


def products(dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """[the kernels', PyTorch's] GFLOP/s by shape."""
    found = {}
    for N, K in SHAPES:
        for n in TOKENS:
            x, weight = torch.randn(n, K).to(dtype), torch.randn(N, K).to(dtype)
            ways = (lambda x=x, w=weight: native.product(x, w, cache=True), lambda x=x, w=weight: F.linear(x, w))
            found[f"{n}x{K}x{N}"] = [round(2e-9 * n * N * K / seconds(way, rounds), 1) for way in ways]
    return found


def steps(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of a decode step without sampling, by rows of CONTEXT tokens."""
    model, found = twins()[0].cast_(dtype).eval(), {}
    for n in TOKENS:
        W = CONTEXT // 16 + 1
        pool = torch.zeros(CONFIG.num_hidden_layers, 1 + n * W, 16, CONFIG.cache_width, dtype=dtype)
        batch = Batch(pool, np.arange(1, 1 + n * W, dtype=np.int32).reshape(n, W), [CONTEXT] * n, [1] * n)
        turns = iter(torch.randint(0, CONFIG.vocab_size, (100_000, 1, n), generator=torch.Generator().manual_seed(0)))

        def step(turns=turns, batch=batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return model.head(model.hidden(next(turns), batch.position_n[None], cache=batch)[0][0], batch)

        found[str(n)] = round(1e3 * seconds(step, rounds), 3)
    return found


def main() -> None:
    options = arguments(__doc__ or "", rounds=10)
    result: dict[str, object] = {"lacking": native.wait()}
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            result[f"gflops {name}"] = products(dtype, options.rounds)
            result[f"step_ms {name}"] = steps(dtype, options.rounds)
    finish(result, options.json)


if __name__ == "__main__":
    main()
