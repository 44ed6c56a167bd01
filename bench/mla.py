"""Held-out loss against bytes of cache a token (bf16): latent attention of several ranks, heads with keys of their own (MHA), heads that
share them (GQA, MQA). Each kind at the best of five learning rates (latent attention's is rank 32's, MQA's is GQA's), three seeds, 95 %
intervals, those of the differences to MHA paired by seed. A byte-level model on Python's standard library.

All have the same four heads, partly rotated; only the way to their keys and values differs. MHA has about the parameters of latent
attention of rank 64, GQA of rank 32, MQA of rank 16.
"""

from functools import partial
from typing import Any

import torch
from _common import finish
from _text import CONFIG, Arm, command_line, interval, texts, train, tune
from torch import Tensor, nn

from pascaline.model.attention import Cache, attend
from pascaline.model.rope import rotate
from pascaline.model.transformer import Model

STEPS = 300
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
RANKS = (8, 16, 32, 64)
GROUPED = {"MHA": 4, "GQA": 2, "MQA": 1}  # heads with keys and values
TUNED = {"MLA": "MLA rank 32", "MHA": "MHA", "GQA": "GQA", "MQA": "GQA"}  # whose learning rate a kind takes


class GroupedAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with latent attention's heads, in its place; for training only."""

    def __init__(self, groups: int):
        super().__init__()
        self.heads, self.groups = CONFIG.num_attention_heads, groups
        self.widths = [self.heads * CONFIG.qk_head_dim, groups * CONFIG.qk_head_dim, groups * CONFIG.v_head_dim]
        self.qkv_proj = nn.Linear(CONFIG.hidden_size, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(self.heads * CONFIG.v_head_dim, CONFIG.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, turn: Tensor, mask_BTT: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = self.qkv_proj(x_BTD).split(self.widths, -1)
        qk = torch.cat((q, k), -1).unflatten(-1, (self.heads + self.groups, -1))
        still, turned = qk.split([CONFIG.qk_nope_head_dim, CONFIG.qk_rope_head_dim], -1)
        q, k = torch.cat((still, rotate(turned, turn)), -1).split([self.heads, self.groups], 2)
        k, v = (shared.repeat_interleave(self.heads // self.groups, 2) for shared in (k, v.unflatten(-1, (self.groups, -1))))
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask_BTT, CONFIG.attention_scale)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def latent(rank: int) -> Model:
    return Model(CONFIG.model_copy(update={"kv_lora_rank": rank}))


def grouped(groups: int) -> Model:
    model = Model(CONFIG)
    for layer in model.model.layers:
        layer.self_attn = GroupedAttention(groups)
    return model


ARMS = {f"MLA rank {rank}": Arm(partial(latent, rank)) for rank in RANKS} | {
    kind: Arm(partial(grouped, groups)) for kind, groups in GROUPED.items()
}
NUMBERS = {f"MLA rank {rank}": rank + CONFIG.qk_rope_head_dim for rank in RANKS} | {
    kind: groups * (CONFIG.qk_head_dim + CONFIG.v_head_dim) for kind, groups in GROUPED.items()
}  # that a token leaves in the cache of a layer


def main() -> None:
    options = command_line(__doc__ or "", STEPS).parse_args()
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
