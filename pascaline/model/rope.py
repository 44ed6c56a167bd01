"""Rotary positions on interleaved pairs (x0, x1), (x2, x3), ..., as DeepSeek lays them out, with YaRN.

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
    over the original context (arXiv 2309.00071, section 3.2).
    """
    inverse = 1.0 / rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.rope_type == "yarn":

        def turning_dim(turns: float) -> float:
            span = rope.original_max_position_embeddings / (turns * 2 * math.pi)
            return dim * math.log(span) / (2 * math.log(rope.rope_theta))

        low = max(math.floor(turning_dim(rope.beta_fast)), 0)
        high = min(math.ceil(turning_dim(rope.beta_slow)), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high > low else 0.001)
        interpolated = ramp.clamp(0, 1)
        inverse = inverse / rope.factor * interpolated + inverse * (1 - interpolated)
    return inverse.to(device)


def angles(rope: Rope, dim: int, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each [B, T, 1, P/2] float32; computed once a forward and shared by all layers."""
    angle = (positions_BT[..., None].float() * inverse_frequencies(rope, dim, positions_BT.device)).unsqueeze(-2)
    return angle.cos() * rope.amplitude, angle.sin() * rope.amplitude


def rotate(x_BTHP: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each interleaved pair; float32 inside, the dtype of x outside."""
    even, odd = x_BTHP.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x_BTHP.dtype)
