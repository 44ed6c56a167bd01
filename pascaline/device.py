"""Which device to compute on, and in which number format it is fastest: measured, not guessed from a name.

torch is imported inside the functions, so that the command line can import this room and still answer at once.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascaline.errors import BadInput
from pascaline.runs import cpu_name, read_json, write_atomic

if TYPE_CHECKING:
    import torch

# [batch, rows, inner, columns] of the products that decide the format: a linear layer and the batched experts of a
# small model, and on an accelerator sizes that are not bound by the launch.
CHOICE_CPU = ((1, 2048, 256, 1024), (16, 256, 256, 256))
CHOICE_ACCELERATOR = ((1, 8192, 2048, 2048), (16, 1024, 1024, 1024))
PEAK_CPU = ((1, 512, 512, 512), (1, 1024, 1024, 1024), (1, 2048, 2048, 2048), (1, 4096, 256, 1024))
PEAK_ACCELERATOR = ((1, 2048, 2048, 2048), (1, 4096, 4096, 4096), (1, 8192, 8192, 8192))
MARGIN = 1.1  # bfloat16 must win by this much: at a tie the exact format is the better one, and noise must not decide
BUDGET = 0.8  # seconds for the choice of a format


def place() -> tuple[int, int]:
    """(rank, how many) of this process among those that torchrun started; (0, 1) without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), size) if size > 1 else (0, 1)


def restarted() -> bool:
    """Whether torchrun has started this process in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def choose(device: "str | torch.device" = "auto") -> "torch.device":
    """The device named ("cpu", "cuda", "cuda:1", "mps"), or for "auto" CUDA where there is one, else the CPU.

    Raises BadInput where the name is unknown or the device is missing.
    """
    import torch

    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise BadInput(f"device '{device}' is unknown; use 'auto', 'cpu', 'cuda', 'cuda:<number>' or 'mps'") from None
    if found.type == "cpu" and not found.index:
        return torch.device("cpu")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) < count:
            return found
        there = f"has {count} CUDA device{'' if count == 1 else 's'}" if count else "has no usable CUDA device"
        raise BadInput(f"device '{device}' is missing: this machine (with this torch) {there}; use 'auto' or 'cpu'")
    if found.type == "mps" and not found.index and torch.backends.mps.is_available():
        return found
    raise BadInput(f"device '{device}' is missing on this machine (with this torch); use 'auto' or 'cpu'")


def free_memory(device: "str | torch.device" = "cpu") -> int:
    """Bytes that can be had there now."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux: half of what the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def device_name(device: "str | torch.device") -> str:
    """The accelerator's name, or the processor's for "cpu"."""
    import torch

    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {cpu_name()}"


def best_dtype(device: "str | torch.device" = "cpu") -> "torch.dtype":
    """torch.bfloat16 where its matrix products are at least MARGIN times as fast here as float32's, else torch.float32.

    Measured once (under a second) and kept in `cache_folder()`/device.json under the device's name, torch's version and
    the thread count. A cache that is broken or cannot be written only costs the measurement. No global random state is
    touched. A run that must resume bit for bit has to record the answer: on another machine it may be the other one.
    """
    import torch

    device = torch.device(device)
    key, path = _key(device), cache_folder() / "device.json"
    speedup = _recall(path).get(key)
    if not isinstance(speedup, int | float) or isinstance(speedup, bool) or not 0 < speedup < math.inf:
        speedup = _speedup(device)
        _remember(path, key, round(speedup, 3))
    return torch.bfloat16 if speedup >= MARGIN else torch.float32


def peak(device: "str | torch.device" = "cpu", measured: bool = True, again: bool = False) -> dict[str, float]:
    """What `measure` gives, kept like `best_dtype`'s answer and so measured once. measured: may be; else {} where nothing is kept.
    again: even if something is (this machine may have been busy then)."""
    import torch

    device = torch.device(device)
    key, path = f"{_key(device)}, peak", cache_folder() / "device.json"
    kept = None if again else _recall(path).get(key)
    if isinstance(kept, dict) and all(isinstance(v, int | float) and 0 <= v < math.inf for v in kept.values()):
        return kept
    if not measured:
        return {}
    found = {name: round(value, 1) for name, value in measure(device).items()}
    _remember(path, key, found)
    return found


def measure(device: "str | torch.device" = "cpu") -> dict[str, float]:
    """{"float32": GFLOP/s, "bfloat16": GFLOP/s}: the machine's peak in matrix products, the best of several sizes.

    A multiply-add counts as 2. A format that the device does not have is 0. Takes a second or two.
    """
    import torch

    device = torch.device(device)
    peak = {"float32": 0.0, "bfloat16": 0.0}
    for shape in PEAK_CPU if device.type == "cpu" else PEAK_ACCELERATOR:
        work = 2e-9 * math.prod(shape)
        for dtype in (torch.float32, torch.bfloat16):
            try:
                multiply = _product(device, dtype, shape)
                best = min(multiply() for _ in range(5))
            except RuntimeError:  # no such format on this device
                continue
            name = str(dtype).removeprefix("torch.")
            peak[name] = max(peak[name], work / best)
    return peak


def cache_folder() -> Path:
    """$PASCALINE_CACHE, or pascaline/ in $XDG_CACHE_HOME, or ~/.cache/pascaline."""
    own = os.environ.get("PASCALINE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pascaline"


def _speedup(device: "torch.device") -> float:
    """How much faster bfloat16 is: the geometric mean over the shapes of the ratio of median times, in turns."""
    import torch

    shapes = CHOICE_CPU if device.type == "cpu" else CHOICE_ACCELERATOR
    deadline = time.perf_counter() + BUDGET
    try:
        pairs = [(_product(device, torch.float32, shape), _product(device, torch.bfloat16, shape)) for shape in shapes]
    except RuntimeError:
        return 0.5  # no bfloat16 here
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
    for _ in range(9):
        for (exact, short), (exact_times, short_times) in zip(pairs, times, strict=True):
            exact_times.append(exact())
            short_times.append(short())
        if time.perf_counter() > deadline:
            break
    ratios = [statistics.median(exact) / statistics.median(short) for exact, short in times]
    return statistics.geometric_mean(ratios)


def _product(device: "torch.device", dtype: "torch.dtype", shape: tuple[int, int, int, int]) -> Callable[[], float]:
    """A function that multiplies once and returns the seconds; it has run once already, so that kernels are chosen."""
    import torch

    batch, rows, inner, columns = shape
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(batch, rows, inner, generator=generator, device=device).to(dtype)
    right = torch.randn(batch, inner, columns, generator=generator, device=device).to(dtype)
    out = torch.empty(batch, rows, columns, device=device, dtype=dtype)

    def multiply() -> float:
        _wait(device)
        start = time.perf_counter()
        with torch.no_grad():
            torch.bmm(left, right, out=out)
        _wait(device)
        return time.perf_counter() - start

    multiply()
    return multiply


def _wait(device: "torch.device") -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _recall(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except OSError:
        return {}


def _key(device: "torch.device") -> str:
    import torch

    return f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _remember(path: Path, key: str, found: Any) -> None:
    try:
        write_atomic(path, json.dumps(_recall(path) | {key: found}, indent=1) + "\n")
    except OSError:
        return  # read-only home, full disk: the next process measures again
