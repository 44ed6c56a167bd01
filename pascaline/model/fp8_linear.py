"""Linear layers whose three products run in block-scaled fp8, as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3.2).

Shapes: n tokens, A outputs, B inputs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pascaline.model.fp8 import BLOCK, dequantise_blocks, dequantise_rows, quantise_blocks, quantise_rows
from pascaline.model.transformer import Model


class Rows(NamedTuple):
    """Values [M, K] with a scale for each 128 of a row."""

    values: Tensor
    scale: Tensor

    def exact(self) -> Tensor:
        return dequantise_rows(self.values, self.scale)


class Blocks(NamedTuple):
    """Values [N, K] with a scale for each 128 x 128."""

    values: Tensor
    scale: Tensor

    def exact(self) -> Tensor:
        return dequantise_blocks(self.values, self.scale)

    def transposed(self) -> "Blocks":
        return Blocks(self.values.t().contiguous(), self.scale.t())


def multiply(a_MK: Rows, b_NK: Rows | Blocks, dtype: torch.dtype) -> Tensor:
    """a b^T in `dtype`, added up in float32; [M, N]. By the device's own fp8 product where it has one for such sizes (`lacking`)."""
    (M, K), N = a_MK.values.shape, len(b_NK.values)
    if not (M % 16 or K % BLOCK or N % BLOCK) and not lacking(a_MK.values.device):
        return multiply_by_hardware(a_MK, b_NK, dtype)
    return F.linear(a_MK.exact(), b_NK.exact()).to(dtype)


def multiply_by_hardware(a_MK: Rows, b_NK: Rows | Blocks, dtype: torch.dtype) -> Tensor:
    """Through F.scaled_mm. cuBLAS wants the scales of rows column by column, and those of blocks with K rounded up to four of them
    (pytorch/pytorch#166752)."""
    kinds = F.ScalingType
    if isinstance(b_NK, Rows):
        scale_b, kind = b_NK.scale.t().contiguous().t(), kinds.BlockWise1x128
    else:
        scale_b, kind = F.pad(b_NK.scale, (0, -b_NK.scale.shape[1] % 4)).contiguous().t(), kinds.BlockWise128x128
    scale_a = a_MK.scale.t().contiguous().t()
    return F.scaled_mm(a_MK.values, b_NK.values.t(), scale_a, kinds.BlockWise1x128, scale_b, kind, output_dtype=dtype)


@lru_cache
def lacking(device: torch.device) -> str:
    """Why block-scaled fp8 is not multiplied by this device itself; "" where it is, and rightly: tried once, against the plain product."""
    if device.type != "cuda":
        return f"{device.type} has no such product"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no scaled_mm"
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, 640, generator=draw, device=device) for size in (256, 384))
    left = Rows(*quantise_rows(a))
    for right in (Rows(*quantise_rows(b)), Blocks(*quantise_blocks(b))):
        try:
            found = multiply_by_hardware(left, right, torch.bfloat16).float()
        except (RuntimeError, ValueError) as e:  # how torch says that a device has no kernel, or not for these scales
            return f"scaled_mm: {str(e).strip().splitlines()[0]}"
        expected = F.linear(left.exact(), right.exact())
        if not (found - expected).abs().max() <= 0.02 * expected.abs().max():
            return "its scaled_mm gives another product"
    return ""


class _Product(torch.autograd.Function):
    """y = Q(x) Q(W)^T; dx = Q(dy) Q(W); dW = Q'(dy)^T Q'(x), whose tiles are 128 tokens of one channel. x is kept in fp8."""

    @staticmethod
    def forward(ctx, x_nB: Tensor, weight_AB: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        x, weight = Rows(*quantise_rows(x_nB)), Blocks(*quantise_blocks(weight_AB))
        ctx.save_for_backward(*x, *weight)
        ctx.dtypes = x_nB.dtype, weight_AB.dtype
        return multiply(x, weight, x_nB.dtype)

    @staticmethod
    def backward(ctx, grad_nA: Tensor):  # type: ignore[no-untyped-def]
        x, weight = Rows(*ctx.saved_tensors[:2]), Blocks(*ctx.saved_tensors[2:])
        grad_x = multiply(Rows(*quantise_rows(grad_nA)), weight.transposed(), ctx.dtypes[0])
        along_tokens = Rows(*quantise_rows(grad_nA.t())), Rows(*quantise_rows(x.exact().t()))
        return grad_x, multiply(*along_tokens, ctx.dtypes[1])


class Fp8Linear(nn.Linear):
    """nn.Linear with the same weight and names; its products are fp8's."""

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def to_fp8_(model: Model) -> int:
    """Let the layers' linear modules multiply in fp8, in place; how many there are. Routers, routed experts, norms, embedding and head
    stay as they are."""
    linears = [m for layer in model.model.layers for m in layer.modules() if type(m) is nn.Linear]
    for module in linears:
        module.__class__ = Fp8Linear
    return len(linears)
