"""Speed of `import` and `export` in MB/s of what they read, against a plain copy of the same files: large blocks, read, write, fsync.
All take turns, the source is in the page cache for all of them or for none (--cold), and what one wrote is removed before the next
begins. Beside them fp8 to bfloat16 and bfloat16 to fp8, which have to compute. Ratios are to the copy; the floor is 0.7."""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _common import finish

from pascaline.model import exchange, hf
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model, parameter_counts
from pascaline.runs import sync_folder

BLOCK = 2**24
FLOOR = 0.7


def config(gigabytes: float) -> ModelConfig:
    """V3's layers at a sixteenth of their width, as many experts as make the size in bfloat16."""
    sizes = dict(
        vocab_size=16384, hidden_size=1024, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2816,
        moe_intermediate_size=512, num_experts_per_tok=4, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, num_nextn_predict_layers=1,
    )  # fmt: skip
    few, more = (sum(parameter_counts(ModelConfig(**sizes, n_routed_experts=n))[k] for k in ("total", "mtp")) for n in (8, 16))
    experts = 8 + round((gigabytes * 5e8 - few) / (more - few) * 8)
    return ModelConfig(**sizes, n_routed_experts=max(experts, 8))


def make(folder: Path, gigabytes: float) -> None:
    """A random model's folder in bfloat16, a few tensors at a time."""
    wanted = config(gigabytes)
    with torch.device("meta"):
        state = Model(wanted).state_dict()
    generator = torch.Generator().manual_seed(0)
    random = ((name, torch.randn(t.shape, generator=generator, dtype=torch.bfloat16) * 0.02) for name, t in state.items())
    hf.save(folder, wanted, random, torch.bfloat16)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    block = memoryview(bytearray(BLOCK))
    for path in sorted(source.iterdir()):
        with open(path, "rb", buffering=0) as read, open(target / path.name, "wb", buffering=0) as written:
            while size := read.readinto(block):
                written.write(block[:size])
            os.fsync(written.fileno())
    sync_folder(target)


def warm(source: Path, cold: bool) -> None:
    """Put the files into the page cache, or out of it."""
    for path in source.iterdir():
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(BLOCK):
                    pass


def seconds(work: Callable[[Path, Path], object], source: Path, target: Path, cold: bool) -> float:
    warm(source, cold)
    os.sync()  # nothing of the round before is still on its way
    began = time.perf_counter()
    work(source, target)
    taken = time.perf_counter() - began
    shutil.rmtree(target)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the model in bfloat16")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache before each turn")
    parser.add_argument("--place", type=Path, help="a folder on the disk to measure (default: the system's temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as name:
        place = Path(name)
        make(place / "plain", options.gigabytes)
        exchange.export_folder(place / "plain", place / "fp8", "fp8", quiet=True)
        variants: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
            "copy": ("plain", copy),
            "import": ("plain", lambda source, target: exchange.import_folder(source, target, quiet=True)),
            "export": ("plain", lambda source, target: exchange.export_folder(source, target, quiet=True)),
            "import to float32": ("plain", lambda source, target: exchange.import_folder(source, target, "float32", quiet=True)),
            "export to fp8": ("plain", lambda source, target: exchange.export_folder(source, target, "fp8", quiet=True)),
            "copy of fp8": ("fp8", copy),
            "import of fp8": ("fp8", lambda source, target: exchange.import_folder(source, target, quiet=True)),
        }
        taken: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.rounds):
            for name, (source, work) in variants.items():
                taken[name].append(seconds(work, place / source, place / "out", options.cold))
        sizes = {kind: sum(path.stat().st_size for path in (place / kind).iterdir()) / 1e6 for kind in ("plain", "fp8")}
    result: dict[str, object] = {"megabytes": sizes, "rounds": options.rounds, "page_cache": "cold" if options.cold else "warm"}
    rates = {name: sizes[source] / statistics.median(taken[name]) for name, (source, _) in variants.items()}
    for name, (source, _) in variants.items():
        ratio = rates[name] / rates["copy" if source == "plain" else "copy of fp8"]
        result[name] = {"MB_per_s": rates[name], "ratio": ratio, "seconds": taken[name]}
        if not options.json:
            print(f"{name:18} {rates[name]:7.0f} MB/s read ({ratio:.2f} of a copy)  {' '.join(f'{s:.2f}' for s in taken[name])} s")
    result["floor_met"] = min(rates["import"], rates["export"]) >= FLOOR * rates["copy"]
    finish(result if options.json else {"megabytes": sizes, "floor_met": result["floor_met"]}, options.json)


if __name__ == "__main__":
    main()
