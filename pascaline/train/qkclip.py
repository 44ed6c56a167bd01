"""QK-clip (Kimi K2, arXiv 2507.20534 section 2.1): where a head's attention logits grew past tau, its query and key weights are scaled
down after the step, so that the next ones do not. Under Muon logits otherwise grow without end."""

import torch
from torch import Tensor

from pascaline.model.attention import LatentAttention
from pascaline.model.transformer import Model
from pascaline.train.optim import Optimizer


class QKClip:
    """watch() before a step's forwards, clip() after its update. tau 0 turns it off: nothing is watched."""

    def __init__(self, model: Model, optimizer: Optimizer, tau: float):
        self.model, self.optimizer, self.tau = model, optimizer, tau
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, LatentAttention)} if tau else {}

    def watch(self) -> None:
        for layer in self.layers.values():
            layer.max_logit_H = torch.zeros(layer.config.num_attention_heads, device=self.model.device)

    @torch.no_grad()
    def clip(self) -> float:
        """Scale each head's weights by gamma = min(1, tau / its largest logit): what is its own (queries and keys without rotation) by
        sqrt(gamma), the rotary query by gamma, the rotary key, which all heads share, not at all. Returns the largest logit."""
        largest = [0.0]
        for name, layer in self.layers.items():
            assert layer.max_logit_H is not None
            largest.append(float(layer.max_logit_H.max()))
            if largest[-1] > self.tau:
                self._scale(name, layer, (self.tau / layer.max_logit_H.clamp(min=self.tau)).view(-1, 1, 1))
        return max(largest)

    def _scale(self, place: str, layer: LatentAttention, gamma_H11: Tensor) -> None:
        c = layer.config
        queries = "qkv_a_proj" if c.q_lora_rank is None else "q_b_proj"
        weight = self.optimizer.masters[f"{place}.{queries}.weight"].data[: c.num_attention_heads * c.qk_head_dim]
        q_HCD = weight.view(c.num_attention_heads, c.qk_head_dim, -1)
        q_HCD[:, : c.qk_nope_head_dim] *= gamma_H11.sqrt()
        q_HCD[:, c.qk_nope_head_dim :] *= gamma_H11
        kv_HCR = self.optimizer.masters[f"{place}.kv_b_proj.weight"].data.view(c.num_attention_heads, -1, c.kv_lora_rank)
        kv_HCR[:, : c.qk_nope_head_dim] *= gamma_H11.sqrt()
        for name in (f"{place}.{queries}.weight", f"{place}.kv_b_proj.weight"):
            self.optimizer.refresh(name)
