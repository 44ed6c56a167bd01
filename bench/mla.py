"""Held-out loss against bytes of cache a token (bf16): latent attention of several ranks, heads with keys of their own (MHA), heads that
share them (GQA, MQA). Each kind at the best of five learning rates (latent attention's is rank 32's, MQA's is GQA's), three seeds, 95 %
intervals, those of the differences to MHA paired by seed. A byte-level model on Python's standard library.

Heads are as many as give the grouped kinds about the parameters of latent attention of rank 32; a head of theirs is wholly rotated.
"""

import argparse
from functools import partial
from typing import Any

import torch
from _common import finish
from _text import CONFIG, Arm, interval, texts, train, tune
from torch import Tensor, nn

from pascaline.model.attention import Cache, attend
from pascaline.model.rope import rotate
from pascaline.model.transformer import Model

STEPS = 300
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
RANKS = (8, 16, 32, 64)
GROUPED = {"MHA": (5, 5), "GQA": (8, 2), "MQA": (8, 1)}  # heads, and those with keys and values
TUNED = {"MLA": "MLA rank 32", "MHA": "MHA", "GQA": "GQA", "MQA": "GQA"}  # whose learning rate a kind takes


class GroupedAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with the model's rotary positions, in place of LatentAttention; for training only."""

    def __init__(self, heads: int, groups: int):
        super().__init__()
        self.width = CONFIG.qk_rope_head_dim
        self.heads, self.groups = heads, groups
        self.qkv_proj = nn.Linear(CONFIG.hidden_size, (heads + 2 * groups) * self.width, bias=False)
        self.o_proj = nn.Linear(heads * self.width, CONFIG.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, turn: Tensor, mask_BTT: Tensor, cache: Cache | None = None) -> Tensor:
        qkv = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.width))
        qk, v = qkv.split([self.heads + self.groups, self.groups], 2)
        q, k = rotate(qk, turn).split([self.heads, self.groups], 2)
        k, v = (shared.repeat_interleave(self.heads // self.groups, 2).transpose(1, 2) for shared in (k, v))
        return self.o_proj(attend(q.transpose(1, 2), k, v, mask_BTT, self.width**-0.5).transpose(1, 2).flatten(2))


def latent(rank: int) -> Model:
    return Model(CONFIG.model_copy(update={"kv_lora_rank": rank}))


def grouped(heads: int, groups: int) -> Model:
    model = Model(CONFIG)
    for layer in model.model.layers:
        layer.self_attn = GroupedAttention(heads, groups)
    return model


ARMS = {f"MLA rank {rank}": Arm(partial(latent, rank)) for rank in RANKS} | {
    kind: Arm(partial(grouped, *heads)) for kind, heads in GROUPED.items()
}
NUMBERS = {f"MLA rank {rank}": rank + CONFIG.qk_rope_head_dim for rank in RANKS} | {
    kind: 2 * groups * CONFIG.qk_rope_head_dim for kind, (_, groups) in GROUPED.items()
}  # that a token leaves in the cache of a layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    options = parser.parse_args()
    data = texts()
    tuning = {arm: tune(ARMS[arm], RATES, data, options.steps, schedule="wsd") for arm in sorted(set(TUNED.values()))}
    rates = {name: next(iter(tuning[TUNED[name.split()[0]]])) for name in ARMS}
    losses = {
        name: [train(arm, rates[name], seed, data, options.steps, schedule="wsd")[options.steps] for seed in options.seeds]
        for name, arm in ARMS.items()
    }
    table: dict[str, Any] = {}
    for name in sorted(ARMS, key=lambda name: NUMBERS[name]):
        with torch.device("meta"):
            size = sum(p.numel() for p in ARMS[name].model().parameters())
        table[name] = {
            "cache_bytes_a_token": 2 * NUMBERS[name] * CONFIG.num_hidden_layers,
            "parameters": size,
            "loss": interval(losses[name]),
            "over_mha": interval([mine - mha for mine, mha in zip(losses[name], losses["MHA"], strict=True)]),
        }
        if not options.json:
            row = table[name]
            print(
                f"{name:12} {row['cache_bytes_a_token']:5} bytes a token  {size:7,} parameters  "
                f"loss {row['loss']['mean']:.4f} +-{row['loss']['plus_minus']:.4f}  "
                f"over MHA {row['over_mha']['mean']:+.4f} +-{row['over_mha']['plus_minus']:.4f}"
            )
    found = {name: {f"{rate:g}": round(loss, 4) for rate, loss in losses.items()} for name, losses in tuning.items()}
    shown = {"table": table} if options.json else {}
    finish({**shown, "rates": rates, "tuning": found, "steps": options.steps}, options.json)


if __name__ == "__main__":
    main()
