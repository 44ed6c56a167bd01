"""Peak memory and time of the head with its loss, forward and backward: F.cross_entropy of whole logits, our losses.token_logprobs, and
F.linear_cross_entropy where the PyTorch release takes options for it. Memory: what a process of its own grows by at its peak, gradients
included; time: in turns. Ratios are to the whole logits; an error is of the weight's gradient, relative to float32's."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import DTYPES, alternate, finish
from torch import Tensor, nn

from pascaline.device import choose
from pascaline.train.losses import token_logprobs

SIZES = ((4096, 16384, 512), (4096, 32768, 512))  # tokens, vocabulary, hidden
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "whole logits": lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight).float(), target),
    "token_logprobs": lambda hidden, weight, target: -token_logprobs(hidden, weight, target)[0].mean(),
}
if hasattr(nn, "LinearCrossEntropyOptions"):
    LOSSES["linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, options=nn.LinearCrossEntropyOptions())
    # What weights of its own for each token need, as in losses.compute.
    LOSSES["... of each token"] = lambda h, w, t: F.linear_cross_entropy(
        h, w, t, options=nn.LinearCrossEntropyOptions(), reduction="none"
    ).mean()


class Head:
    """Random states, weights and targets, and one forward and backward of a loss on them."""

    def __init__(self, tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, hidden, generator=generator).to(device, dtype).requires_grad_()
        self.weight = torch.randn(vocabulary, hidden, generator=generator).mul_(0.05).to(device, dtype).requires_grad_()
        self.target = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)

    def step(self, name: str) -> int:
        self.hidden.grad = self.weight.grad = None
        LOSSES[name](self.hidden, self.weight, self.target).backward()
        if self.hidden.is_cuda:
            torch.cuda.synchronize()
        return len(self.hidden)

    def slope(self, name: str) -> Tensor:
        self.step(name)
        assert self.weight.grad is not None
        return self.weight.grad.float()


def resident(key: str) -> float:
    """MB of this process: VmRSS now, VmHWM at the highest since `clear_refs`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak(name: str, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """MB by which this process, or what it has of the GPU, grows at the most over one step."""
    Head(64, 128, 64, dtype, device).step(name)  # libraries are loaded
    head = Head(*size, dtype, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head.step(name)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    resident_before = resident("VmRSS")
    head.step(name)
    return resident("VmHWM") - resident_before


def compare(size: tuple[int, int, int], dtype: str, device: torch.device, rounds: int) -> dict[str, Any]:
    head, exact = Head(*size, DTYPES[dtype], device), Head(*size, torch.float32, device)
    with torch.no_grad():
        for mine, theirs in ((exact.hidden, head.hidden), (exact.weight, head.weight)):
            mine.copy_(theirs)
    right = exact.slope("whole logits")
    found: dict[str, Any] = {}
    for name in LOSSES:
        # Every large tensor gets pages of its own and gives them back, so that resident memory is what is in use.
        settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        asked = [sys.executable, __file__, "--alone", json.dumps([name, size, dtype, str(device)])]
        found[name] = {"peak_mb": json.loads(subprocess.run(asked, check=True, capture_output=True, text=True, env=settings).stdout)}
        found[name]["error"] = float((head.slope(name) - right).norm() / right.norm())
    del exact, right
    rates = alternate({name: lambda name=name: head.step(name) for name in LOSSES}, rounds)  # type: ignore[misc]
    for name, row in found.items():
        row["seconds"] = size[0] / statistics.median(rates[name])
        row |= {f"{key}_ratio": row[key] / found["whole logits"][key] for key in ("peak_mb", "seconds")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        name, size, dtype, device = json.loads(options.alone)
        print(json.dumps(peak(name, tuple(size), DTYPES[dtype], torch.device(device))))
        return
    result: dict[str, Any] = {}
    for size in SIZES:
        for dtype in DTYPES:
            case = f"{' x '.join(map(str, size))} {dtype}"
            result[case] = compare(size, dtype, choose(options.device), options.rounds)
            if not options.json:
                for name, row in result[case].items():
                    print(
                        f"{case:28} {name:20} {row['peak_mb']:6.0f} MB ({row['peak_mb_ratio']:.2f})  {row['seconds']:6.2f} s"
                        f" ({row['seconds_ratio']:.2f})  error {row['error']:.1e}"
                    )
    finish(result if options.json else {}, options.json)


if __name__ == "__main__":
    main()
