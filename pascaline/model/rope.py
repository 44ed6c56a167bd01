"""Rotary positions (arXiv 2104.09864) on interleaved pairs (x0, x1), (x2, x3), ... as DeepSeek lays them out, or on halves (x0, xP/2),
(x1, xP/2+1), ... as Llama's Hugging Face folders do, with YaRN's and Llama 3.1's scaling.

Shapes: B batch, T tokens, H heads, P rotary dims.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from pascaline.model.config import Rope


@lru_cache(maxsize=32)
def inverse_frequencies(rope: Rope, dim: int, device: torch.device) -> Tensor:
    """Angle per position of each rotary pair, [P/2] float32.

    YaRN blends interpolated and original frequencies by a ramp between the dims that turn beta_fast and beta_slow times
    over the original context (arXiv 2309.00071, section 3.2). Llama 3.1 blends them by how often a pair turns over the original context,
    between low_freq_factor and high_freq_factor times.
    """
    inverse = 1.0 / rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "yarn":

        def turning_dim(turns: float) -> float:
            span = rope.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(span) / (2 * math.log(rope.rope_theta))

        low, high = turning_dim(rope.beta_fast), turning_dim(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high > low else 0.001)
        interpolated = ramp.clamp(0, 1)
        inverse = inverse / rope.factor * interpolated + inverse * (1 - interpolated)
    if rope.rope_type == "llama3":
        turned = rope.original_max_position_embeddings * inverse / (2 * math.pi)
        kept = ((turned - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        inverse = inverse / rope.factor * (1 - kept) + inverse * kept
    return inverse.to(device)


def turns(rope: Rope, dim: int, positions_BT: Tensor) -> Tensor:
    """What a position multiplies each pair by, as a complex number, [B, T, 1, P/2]; computed once a forward and shared by all layers."""
    angle = (positions_BT[..., None].float() * inverse_frequencies(rope, dim, positions_BT.device)).unsqueeze(-2)
    return torch.polar(torch.full_like(angle, rope.amplitude), angle)


def rotate(x_BTHP: Tensor, turn: Tensor) -> Tensor:
    """Rotate each interleaved pair; float32 inside, the dtype of x outside."""
    if torch.compiler.is_compiling():  # which fuses everything but complex numbers
        even, odd = x_BTHP.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * turn.real - odd * turn.imag, odd * turn.real + even * turn.imag), -1)
        return turned.flatten(-2).to(x_BTHP.dtype)
    pairs = torch.view_as_complex(x_BTHP.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x_BTHP.dtype)


def rotate_halves(x_BTHP: Tensor, turn: Tensor) -> Tensor:
    """Rotate each pair of the two halves; float32 inside, the dtype of x outside."""
    left, right = x_BTHP.float().chunk(2, -1)
    return torch.cat((left * turn.real - right * turn.imag, right * turn.real + left * turn.imag), -1).to(x_BTHP.dtype)
