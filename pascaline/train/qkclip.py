"""QK-clip (Kimi K2, arXiv 2507.20534 section 2.1): where a head's attention logits grew past tau, its query and key weights are scaled
down after the step, so that the next ones do not. Under Muon logits otherwise grow without end."""

import torch
from torch import Tensor

from pascaline.errors import BadInput
from pascaline.model.attention import GroupedAttention, LatentAttention
from pascaline.model.transformer import Model
from pascaline.train.optim import Optimizer


class QKClip:
    """watch() before a step's forwards, clip() after its update. tau 0 turns it off: nothing is watched."""

    def __init__(self, model: Model, optimizer: Optimizer, tau: float):
        self.optimizer, self.tau = optimizer, tau
        if tau and model.config.model_type == "qwen3":
            raise BadInput("qk_clip does nothing to qwen3, whose norms on queries and keys bound the logits already; leave it at 0.")
        kinds = (LatentAttention, GroupedAttention)
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)} if tau else {}

    def watch(self) -> None:
        for layer in self.layers.values():
            layer.max_logit_H = torch.zeros(layer.config.num_attention_heads, device=layer.o_proj.weight.device)

    @torch.no_grad()
    def clip(self, fine: Tensor | bool = True) -> Tensor:
        """Scale each head's weights by gamma = min(1, tau / its largest logit): what is its own (queries and keys without rotation) by
        sqrt(gamma), the rotary query by gamma, the rotary key, which all heads share, not at all; of grouped heads, which share their
        keys, the queries by gamma. Nothing where `fine` does not hold.
        Returns the largest logit of all layers, heads and ranks, a scalar."""
        largest_LH = self.optimizer.ranks.max(torch.stack([m.max_logit_H for m in self.layers.values() if m.max_logit_H is not None]))
        gamma_LH = torch.where(torch.as_tensor(fine, device=largest_LH.device), self.tau / largest_LH.clamp(min=self.tau), 1.0)
        for (name, layer), gamma_H in zip(self.layers.items(), gamma_LH, strict=True):
            self._scale(name, layer, gamma_H)
        return largest_LH.max()

    def _scale(self, place: str, layer: LatentAttention | GroupedAttention, gamma_H: Tensor) -> None:
        c = layer.config
        if not c.latent:
            rows = torch.cat((gamma_H.repeat_interleave(c.qk_head_dim), gamma_H.new_ones(2 * c.kv_heads * c.qk_head_dim)))
            for name in (f"{place}.qkv_proj.weight", f"{place}.qkv_proj.bias"):
                if name in self.optimizer.working:
                    self.optimizer.scale_rows(name, rows)
            return
        queries = f"{place}.{'qkv_a_proj' if c.q_lora_rank is None else 'q_b_proj'}.weight"
        content, rotary, value = gamma_H.sqrt().unsqueeze(1), gamma_H.unsqueeze(1), torch.ones_like(gamma_H).unsqueeze(1)
        q_rows = torch.cat((content.expand(-1, c.qk_nope_head_dim), rotary.expand(-1, c.qk_rope_head_dim)), 1).flatten()
        others = len(self.optimizer.working[queries]) - len(q_rows)  # the latent and the rotary key, where they share the matrix
        kv_rows = torch.cat((content.expand(-1, c.qk_nope_head_dim), value.expand(-1, c.v_head_dim)), 1).flatten()
        self.optimizer.scale_rows(queries, torch.cat((q_rows, torch.ones_like(q_rows[:1]).expand(others))))
        self.optimizer.scale_rows(f"{place}.kv_b_proj.weight", kv_rows)
