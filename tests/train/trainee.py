"""A run of a few tiny steps, for the loop's tests; importable by a child process that is to be killed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pascaline.data.batch import Batch, Sample
from pascaline.data.loader import ListSamples, Loader
from pascaline.model.config import ModelConfig
from pascaline.model.transformer import Model
from pascaline.tables import Stage
from pascaline.train.loop import Trainer
from pascaline.train.losses import Loss
from pascaline.train.parallel import ALONE, Ranks

VOCAB = 19
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, moe_intermediate_size=8,
    n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    num_nextn_predict_layers=1, initializer_range=0.1,
)  # fmt: skip


def counting(count: int = 200) -> list[Sample]:
    """Documents that count upwards modulo VOCAB: learnable from the last token alone."""
    draw = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        tokens = (draw.integers(VOCAB) + np.arange(draw.integers(3, 13))) % VOCAB
        samples.append(Sample(tokens, {"ce": np.ones(len(tokens), np.float32)}))
    return samples


def model(seed: int = 1, **changes) -> Model:
    return Model(ModelConfig(**{**SHAPE, **changes})).init_(seed)


def stage(**changes) -> Stage:
    return Stage(**{"lr": 0.01, "warmup": 2, "save_every": 3, "balance_rate": 0.01, "mtp": 0.3, "sequence_length": 24, **changes})


def loader(ranks: Ranks = ALONE, micro: int = 2) -> Loader:
    return Loader(ListSamples(counting()), row=24, rows=4, micro=micro, pad=0, seed=5, rank=ranks.rank, ranks=ranks.size)


class Watched:
    """A source that does something (crash, signal, change the batch) when a step is asked for."""

    def __init__(self, act: Any, source: Loader | None = None):
        self.source, self.act, self.asked = source or loader(), act, list[int]()

    @property
    def facts(self) -> dict[str, Any]:
        return self.source.facts

    def step(self, step: int) -> list[Batch]:
        self.asked.append(step)
        batches = self.source.step(step)
        return self.act(step, batches) or batches

    def documents(self, step: int) -> Any:
        return self.source.documents(step)


def trainer(folder: Path, seed: int = 1, dtype: torch.dtype = torch.float32, shape: Any = None, ranks: Ranks = ALONE, **changes) -> Trainer:
    table = stage(**changes)
    rule = Loss(mtp=table.mtp, balance=table.sequence_balance, z=table.z_loss)
    return Trainer(model(seed, **(shape or {})), table, rule, folder, "toy", dtype, ranks)


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "rank_seconds", "slowest_per_median")} for row in found]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def run_to_the_end(folder: str, steps: int, save_every: int) -> None:
    """What the child does; its own initial seed, so that all but the first checkpoint's past must come from the disk."""
    torch.set_num_threads(1)
    trainer(Path(folder), save_every=save_every).run(loader(), steps, quiet=True)


def tensors_file(folder: Path, step: int) -> Path:
    """Where a checkpoint of one rank keeps its tensors."""
    (file,) = (folder / "state" / f"step-{step}").glob("*.safetensors")
    return file
