"""Block-scaled fp8 as DeepSeek-V3 stores and computes it (arXiv 2412.19437, section 3.3), in plain torch operations.

Values are float8_e4m3fn, each tile of them with one float32 factor: tensor = values * scale_inv. A tile is 128 x 128 of a weight,
and 1 x 128 channels of one token for an activation; at the edges it is what is left.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
MAX = 448.0  # of e4m3
SMALLEST = 1e-4  # an activation's amax is at least this
LEAST = 2.0**-126  # a scale is a normal number, also that of zeros


def quantise_blocks(w_AB: Tensor, round_scales: bool = False) -> tuple[Tensor, Tensor]:
    """[A, B] -> float8_e4m3fn [A, B] and scale_inv float32 [ceil(A / 128), ceil(B / 128)], the tile's amax / 448.

    round_scales: to the next power of two (V3.1's ue8m0). A tile that holds NaN or inf has a scale that says so."""
    scales = []
    q_AB = torch.empty(w_AB.shape, dtype=torch.float8_e4m3fn, device=w_AB.device)
    for rows_RB, out_RB in zip(w_AB.split(BLOCK), q_AB.split(BLOCK), strict=True):  # a band at a time: no second copy of w in float32
        band_RB = rows_RB.float()
        scale_C = _scale(_tiles(band_RB.abs().amax(0)).amax(-1), round_scales)
        out_RB.copy_(_divided(band_RB, _spread(scale_C, w_AB.shape[1])))
        scales.append(scale_C)
    return q_AB, torch.stack(scales)


def dequantise_blocks(q_AB: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float8_e4m3fn [A, B] and scale_inv [ceil(A / 128), ceil(B / 128)] -> their product in `dtype`, taken in float32."""
    out_AB = torch.empty(q_AB.shape, dtype=dtype, device=q_AB.device)
    for q_RB, scale_C, out_RB in zip(q_AB.split(BLOCK), scale_inv.float(), out_AB.split(BLOCK), strict=True):
        out_RB.copy_(to_float(q_RB).mul_(_spread(scale_C, q_AB.shape[1])))
    return out_AB


def quantise_rows(x: Tensor, round_scales: bool = False) -> tuple[Tensor, Tensor]:
    """[..., D] -> float8_e4m3fn [..., D] and scale_inv float32 [..., ceil(D / 128)]: max(amax, 1e-4) / 448 of 128 channels of a token."""
    x = x.float()
    scale = _scale(_tiles(x.abs()).amax(-1).clamp(min=SMALLEST), round_scales)
    return _divided(x, _spread(scale, x.shape[-1])).to(torch.float8_e4m3fn), scale


def dequantise_rows(q: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float8_e4m3fn [..., D] and scale_inv [..., ceil(D / 128)] -> their product in `dtype`, taken in float32."""
    return to_float(q).mul_(_spread(scale_inv, q.shape[-1])).to(dtype)


def to_float(q: Tensor) -> Tensor:
    """What q.float() gives; on the CPU, where that takes a value at a time, 10 to 50 times as fast (`bench exchange` lives on it).

    Sign, exponent and mantissa of e4m3 are moved to where float16 has them, whose exponent counts from 15 and not from 7: 2^8 too small."""
    if q.device.type != "cpu":
        return q.float()
    moved = q.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign fills bits 14 and 15
    x = moved.view(torch.float16).float().mul_(256)
    if x.numel() and x.abs().amax() > MAX:  # NaN, the pattern above 448
        x[x.abs() > MAX] = torch.nan
    return x


def scale_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """[A, B] -> (ceil(A / 128), ceil(B / 128)), the shape of a weight's scale_inv."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def _scale(amax: Tensor, round_scales: bool) -> Tensor:
    scale = (amax / MAX).clamp(min=LEAST)
    if not round_scales:
        return scale
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.where((mantissa > 0.5) & mantissa.isfinite(), 1.0, mantissa), exponent)


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    # The largest may come out a rounding error above 448, which torch turns into NaN in some releases.
    return (x / scale).clamp_(-MAX, MAX)


def _tiles(x: Tensor) -> Tensor:
    """[..., D] -> [..., ceil(D / 128), 128], the last one filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _spread(scale: Tensor, width: int) -> Tensor:
    """[..., C] -> [..., width]: each channel's scale."""
    return scale.repeat_interleave(BLOCK, -1)[..., :width]
