"""What the benchmarks share: the measured model, its transformers twin, alternating rounds."""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.runs import machine, versions

CONFIG = ModelConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=768, moe_intermediate_size=192,
    n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=32,
    v_head_dim=64, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def twins(seed: int = 0) -> tuple[Model, Callable[[torch.dtype], Any]]:
    """Our model, and a function that gives transformers' model with the same weights in a dtype."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = tempfile.mkdtemp()
    model = Model(CONFIG).init_(seed)
    model.save(folder)
    return model, lambda dtype: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def alternate(variants: dict[str, Callable[[], int]], rounds: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """Units per second of every variant, one number a round; the variants take turns, so that a slow minute slows all of them.

    A variant returns how many units it did; in a round it runs for `seconds`, at least once.
    """
    for work in variants.values():
        work()  # warm up
    out: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            rates, end = [], time.perf_counter() + seconds
            while not rates or time.perf_counter() < end:
                began = time.perf_counter()
                units = work()
                rates.append(units / (time.perf_counter() - began))
            out[name].append(statistics.median(rates))
    return out


def best(rates: dict[str, list[float]], who: str) -> tuple[str, float]:
    """The fastest of a side's variants ("who dtype"): name and median over the rounds."""
    medians = {name: statistics.median(values) for name, values in rates.items() if name.startswith(who)}
    name = max(medians, key=lambda n: medians[n])
    return name, medians[name]


def arguments(description: str, rounds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser.parse_args()


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print the result with the machine it was measured on."""
    result |= {"machine": machine() | {"threads": torch.get_num_threads()}, "versions": versions()}
    if as_json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:12} {json.dumps(value)}")
