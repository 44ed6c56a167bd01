"""RMSNorm with a hand-written gradient, beside its plain form (parity: tests).

On the CPU PyTorch composes its backward from many passes over memory; in bf16 this one takes half the time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def]
        rstd = (torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_() / x.shape[-1] + eps).rsqrt_()
        unit = x * rstd.to(x.dtype)
        ctx.save_for_backward(unit, weight, rstd)
        return unit * weight

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        unit, weight, rstd = ctx.saved_tensors
        along = grad * unit  # [..., D]
        grad_weight = along.flatten(0, -2).sum(0)
        # d(unit)/dx removes the component along unit: (g w - unit * mean(g w unit)) * rstd
        drop = torch.matmul(along, weight.unsqueeze(-1)) / -unit.shape[-1]
        return torch.addcmul(grad * weight, unit, drop).mul_(rstd.to(grad.dtype)), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_plain`; while training on the CPU with a two-pass backward."""
    if torch.is_grad_enabled() and x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_plain(x, weight, eps)
