"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1), expanded and absorbed side by side, and attention of grouped
queries (arXiv 2305.13245) for the dense families.

Shapes: B batch, T new tokens, S cached tokens, H heads, D hidden, R latent rank, N non-rotary dims, P rotary dims, V value dims;
grouped: K heads of keys and values, G queries to each, C numbers a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pascaline.model import native
from pascaline.model.config import ModelConfig
from pascaline.model.paged import lacking
from pascaline.model.rope import rotate, rotate_halves

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

LATENT_EPS = 1e-6  # the norms on the latents keep this whatever rms_norm_eps is (V3 and transformers alike)
QUERY_BLOCK = 128


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, cache: "Cache | None" = None) -> Tensor:
        return native.rms_norm(x, self.weight, self.eps, cache)


@dataclass
class Part:
    """Rows of a step that attend together: P of them, T new tokens each with padding, among the step's n."""

    blocks_PW: Tensor  # of the cache
    take_PT: Tensor | None  # which of the n tokens; None: all of them, in order, T = 1
    put: Tensor | None  # of the P * T results those that count ...
    to: Tensor | None  # ... and which tokens they belong to
    mask_PTS: Tensor  # to add to scores


class Cache(Protocol):
    """What attention asks of a cache while it decodes. The batch is then [1, n]: n tokens of several rows, each after earlier ones."""

    @property
    def parts(self) -> Sequence[Part]: ...

    @property
    def few(self) -> bool:
        """Whether no row has more than a few new tokens, as it is while all decode."""
        ...

    def attend(self, layer: int, q_nHC: Tensor, value_width: int, scale: float) -> Tensor:
        """Attention of each token to its row's entries where they lie, [n, H, value_width]: pascaline.model.paged."""
        ...

    def append(self, layer: int, entries_nC: Tensor) -> None:
        """Store the new tokens' entries ([latent | rotary key], or [keys | values])."""
        ...

    def entries(self, layer: int, part: Part) -> Tensor:
        """Everything stored of a part's rows, [P, S, C]."""
        ...

    def routed(self, layer: int, chosen_nK: Tensor) -> None:
        """Note the experts that the layer, number so and so of those with experts, chose for the new tokens, if that is wanted."""
        ...


def by_parts(cache: Cache, queries_1n: Sequence[Tensor], attend_part: Callable[[Part, list[Tensor]], Tensor], width: int) -> Tensor:
    """Attention part by part: queries [1, n, ...] dealt out as [P, T, ...], results [P, T, width] put together as [1, n, width]."""
    whole = [q[0].unsqueeze(1) for q in queries_1n]
    out = queries_1n[0].new_empty(queries_1n[0].shape[1], width)
    for part in cache.parts:
        if part.take_PT is None:
            return attend_part(part, whole).transpose(0, 1)
        found = attend_part(part, [q[0][part.take_PT] for q in queries_1n])
        out[part.to] = found.flatten(0, 1)[part.put]
    return out[None]


class LatentAttention(nn.Module):
    """Queries and one latent per token. Training and prefill expand the latent to keys and values per head; decoding absorbs
    the expansion into the query and the output, so the cache holds only R + P numbers a token."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.max_logit_H: Tensor | None = None  # of the forwards with gradient, if a tensor is put here (QK-clip)
        heads, rank = config.num_attention_heads, config.kv_lora_rank

        def linear(fan_in: int, fan_out: int) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, bias=False)

        # Query (or its latent), latent and rotary key in one matmul.
        self.widths = [config.q_lora_rank or heads * config.qk_head_dim, rank, config.qk_rope_head_dim]
        self.qkv_a_proj = linear(config.hidden_size, sum(self.widths))
        if config.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_EPS)
        self.kv_b_proj = linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = linear(heads * config.v_head_dim, config.hidden_size)

    def forward(self, x_BTD: Tensor, turn: Tensor, mask_BTT: "Tensor | BlockMask | None", cache: Cache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. `mask_BTT` says which new token sees which new token; a cache that holds earlier ones says it itself."""
        c = self.config
        q, latent, k_rope = self.qkv_a_proj(x_BTD).split(self.widths, -1)
        if c.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_nope, q_rope = q.unflatten(-1, (c.num_attention_heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent)
        # One rotary call for the queries of all heads and the one key they share.
        q_rope, k_rope = rotate(torch.cat((q_rope, k_rope.unsqueeze(2)), 2), turn).split([c.num_attention_heads, 1], 2)
        if cache is not None:
            cache.append(self.layer, torch.cat((latent, k_rope.squeeze(2)), -1)[0])
            if cache.few and not lacking(x_BTD.device):
                queries_nHC = self._absorb(q_nope, q_rope)[0]
                return self.o_proj(self._release(cache.attend(self.layer, queries_nHC, c.kv_lora_rank, c.attention_scale))[None])

            def attend_part(part: Part, queries: list[Tensor]) -> Tensor:
                return self._stored(queries[0], queries[1], cache.entries(self.layer, part), part.mask_PTS)

            return self.o_proj(by_parts(cache, (q_nope, q_rope), attend_part, c.num_attention_heads * c.v_head_dim))
        assert mask_BTT is not None
        return self.o_proj(self._expanded(q_nope, q_rope, latent, k_rope, mask_BTT))

    def _stored(self, q_nope: Tensor, q_rope: Tensor, entries_BSC: Tensor, mask_BTS: Tensor) -> Tensor:
        """Attention to stored entries in the form that takes fewer multiplications: one or a few queries absorb, long prompts expand."""
        c, T, S = self.config, q_nope.shape[1], entries_BSC.shape[1]
        R, P, N, V = c.kv_lora_rank, c.qk_rope_head_dim, c.qk_nope_head_dim, c.v_head_dim
        if T * R * (N + V) + T * S * (2 * R + P) <= S * R * (N + V) + T * S * (N + P + V):
            return self._absorbed(q_nope, q_rope, entries_BSC, mask_BTS)
        latent, k_rope = entries_BSC.split([R, P], -1)
        return self._expanded(q_nope, q_rope, latent, k_rope.unsqueeze(2), mask_BTS, causal=False)

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent_BSR: Tensor, k_rope: Tensor, mask_BTS: "Tensor | BlockMask", causal: bool = True
    ) -> Tensor:
        """The form of the paper's equations: keys and values per head. [B, T, H*V]."""
        c = self.config
        B, T, H, _ = q_nope.shape
        kv = self.kv_b_proj(latent_BSR).unflatten(-1, (H, c.qk_nope_head_dim + c.v_head_dim))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        q = torch.cat((q_nope, q_rope), -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, H, -1)), -1).transpose(1, 2)
        if self.max_logit_H is not None and torch.is_grad_enabled():
            assert isinstance(mask_BTS, Tensor)
            self.max_logit_H = torch.maximum(self.max_logit_H, largest_logits(q, k, mask_BTS, c.attention_scale))
        return attend(q, k, v.transpose(1, 2), mask_BTS, c.attention_scale, causal).transpose(1, 2).reshape(B, T, H * c.v_head_dim)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, entries_BSC: Tensor, mask_BTS: Tensor) -> Tensor:
        """(q W_UK) . latent equals q . (W_UK latent): attend in the latent space, expand only the result. [B, T, H*V]."""
        B, T, H, _ = q_nope.shape
        # All heads are queries of one head, whose keys and values are both the entries.
        mask_BQS = mask_BTS if T == 1 else mask_BTS.repeat_interleave(H, 1)
        q = self._absorb(q_nope, q_rope).flatten(1, 2)
        mixed = attend_latent(q, entries_BSC, mask_BQS, self.config.attention_scale)[..., : self.config.kv_lora_rank]
        return self._release(mixed.reshape(B * T, H, -1)).view(B, T, -1)

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries in the latent space beside the rotary ones, [B, T, H, R+P]."""
        B, T, H, N = q_nope.shape
        up_HNR = self.kv_b_proj.weight.view(H, -1, self.config.kv_lora_rank)[:, :N]
        latent_HnR = torch.matmul(q_nope.reshape(B * T, H, N).transpose(0, 1), up_HNR)
        return torch.cat((latent_HnR.transpose(0, 1).reshape(B, T, H, -1), q_rope), -1)

    def _release(self, mixed_nHR: Tensor) -> Tensor:
        """From the latent space to the heads' values, [n, H*V]."""
        c, (n, H, _) = self.config, mixed_nHR.shape
        down_HRV = self.kv_b_proj.weight.view(H, -1, c.kv_lora_rank)[:, c.qk_nope_head_dim :].transpose(1, 2)
        return torch.matmul(mixed_nHR.transpose(0, 1), down_HRV).transpose(0, 1).reshape(n, H * c.v_head_dim)


class GroupedAttention(nn.Module):
    """Queries in groups that share a head of keys and values, all in one matmul. The cache holds keys and values, 2 K C numbers a token."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.max_logit_H: Tensor | None = None
        width, heads = config.qk_head_dim, config.num_attention_heads
        self.widths = [heads * width, config.kv_heads * width, config.kv_heads * width]
        biased = config.attention_bias or config.model_type == "qwen2"
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=biased)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=config.attention_bias)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(width, config.rms_norm_eps)
            self.k_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, turn: Tensor, mask_BTT: "Tensor | BlockMask | None", cache: Cache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], as LatentAttention's."""
        c = self.config
        q, k, v = (part.unflatten(-1, (-1, c.qk_head_dim)) for part in self.qkv_proj(x_BTD).split(self.widths, -1))
        if c.model_type == "qwen3":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_halves(torch.cat((q, k), 2), turn).split([c.num_attention_heads, c.kv_heads], 2)
        if cache is not None:
            cache.append(self.layer, torch.cat((k.flatten(2), v.flatten(2)), -1)[0])
            if cache.few and not lacking(x_BTD.device):
                return self.o_proj(cache.attend(self.layer, q[0], c.qk_head_dim, c.attention_scale).flatten(1)[None])

            def attend_part(part: Part, queries: list[Tensor]) -> Tensor:
                return self._stored(queries[0], cache.entries(self.layer, part), part.mask_PTS)

            return self.o_proj(by_parts(cache, (q,), attend_part, c.num_attention_heads * c.qk_head_dim))
        assert mask_BTT is not None
        groups = c.num_attention_heads // c.kv_heads
        q, k, v = (part.transpose(1, 2) for part in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        if self.max_logit_H is not None and torch.is_grad_enabled():
            assert isinstance(mask_BTT, Tensor)
            self.max_logit_H = torch.maximum(self.max_logit_H, largest_logits(q, k, mask_BTT, c.attention_scale))
        return self.o_proj(attend(q, k, v, mask_BTT, c.attention_scale).transpose(1, 2).flatten(2))

    def _stored(self, q_BTHC: Tensor, entries_BSC: Tensor, mask_BTS: Tensor) -> Tensor:
        """Few queries against all entries; the queries of a group stand side by side, so that no key is copied. [B, T, H*C]."""
        c = self.config
        groups = c.num_attention_heads // c.kv_heads
        T = q_BTHC.shape[1]
        q = q_BTHC.unflatten(2, (c.kv_heads, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, K, G*T, C]
        k, v = entries_BSC.unflatten(-1, (2, c.kv_heads, c.qk_head_dim)).permute(2, 0, 3, 1, 4)  # each [B, K, S, C]
        mask = mask_BTS if mask_BTS.shape[1] == 1 else mask_BTS.repeat(1, groups, 1)
        scores = torch.matmul(q * c.attention_scale, k.transpose(2, 3)) + mask.unsqueeze(1)
        mixed = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
        return mixed.unflatten(2, (groups, T)).permute(0, 3, 1, 2, 4).flatten(2)


def visible(document_ids_BT: Tensor | None, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Who sees whom, as a mask to add to scores: 0 for an earlier or the same position of the same document, else -inf.
    [B or 1, T, T] in `dtype`."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None]
    if document_ids_BT is not None:
        hidden = hidden | (document_ids_BT[:, :, None] != document_ids_BT[:, None, :])
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def visible_blocks(document_ids_BT: Tensor | None, batch: int, length: int, device: torch.device) -> "BlockMask":
    """The same for FlexAttention, which leaves out whole blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        earlier = query >= key
        return earlier if document_ids_BT is None else earlier & (document_ids_BT[b, query] == document_ids_BT[b, key])

    rows = None if document_ids_BT is None else batch
    return create_block_mask(sees, rows, None, length, length, device=device)


def attend(q_BHTC: Tensor, k_BHSC: Tensor, v_BHSV: Tensor, mask_BTS: "Tensor | BlockMask", scale: float, causal: bool = True) -> Tensor:
    """Attention under an additive mask, or under blocks of one, [B, H, T, V]. causal: query i sees keys 0..i at most.

    CPU kernels of scaled_dot_product_attention are no faster in bf16 than in float32 and want equal head dims, so on the CPU
    blocks of queries meet only the keys before them in plain matmuls; elsewhere PyTorch's kernel does it (parity: tests).
    """
    if not isinstance(mask_BTS, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q_BHTC, k_BHSC, v_BHSV, block_mask=mask_BTS, scale=scale)
    mask = mask_BTS.unsqueeze(1)
    if q_BHTC.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSV, attn_mask=mask, scale=scale)
    out = []
    for start in range(0, q_BHTC.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q_BHTC.shape[2])
        seen = stop if causal else k_BHSC.shape[2]
        scores = torch.matmul(q_BHTC[:, :, start:stop] * scale, k_BHSC[:, :, :seen].transpose(2, 3))
        weights = scores.add_(mask[:, :, start:stop, :seen]).softmax(-1)
        out.append(torch.matmul(weights, v_BHSV[:, :, :seen]))
    return torch.cat(out, 2) if len(out) > 1 else out[0]


@torch.no_grad()
def largest_logits(q_BHTC: Tensor, k_BHTC: Tensor, mask_BTT: Tensor, scale: float) -> Tensor:
    """The largest score of each head before the softmax, [H] float32. A second q k^T: kernels keep their scores to themselves."""
    blocks = []
    for start in range(0, q_BHTC.shape[2], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q_BHTC.shape[2])
        scores = torch.matmul(q_BHTC[:, :, start:stop] * scale, k_BHTC[:, :, :stop].transpose(2, 3))
        blocks.append((scores + mask_BTT[:, None, start:stop, :stop]).amax((0, 2, 3)))
    return torch.stack(blocks).amax(0).float()


def attend_latent(q_BQC: Tensor, entries_BSC: Tensor, mask_BQS: Tensor, scale: float) -> Tensor:
    """Attention of a few queries to entries that are keys and values at once, under an additive mask, [B, Q, C].

    Several rows on the CPU in float32: its bf16 kernels take up to twice as long for so few queries (parity: tests).
    """
    if q_BQC.device.type != "cpu" or len(q_BQC) == 1:
        entries = entries_BSC.unsqueeze(1)
        return F.scaled_dot_product_attention(q_BQC.unsqueeze(1), entries, entries, attn_mask=mask_BQS.unsqueeze(1), scale=scale)[:, 0]
    entries = entries_BSC.float()
    weights = torch.baddbmm(mask_BQS.float(), q_BQC.float(), entries.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(weights, entries).to(q_BQC.dtype)
