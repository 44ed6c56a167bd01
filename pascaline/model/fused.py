"""RMSNorm with a hand-written gradient, beside its plain form (parity: tests).

On the CPU PyTorch composes its backward from many passes over memory; in bf16 this one takes half the time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 1 << 14


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


def rms_norm_of_few(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same as a LayerNorm of [x, -x], whose mean is 0 and whose variance is mean(x^2): one kernel instead of seven."""
    both = F.layer_norm(torch.cat((x, -x), -1), (2 * x.shape[-1],), eps=eps)
    return both[..., : x.shape[-1]] * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_plain`, on the CPU by what is fastest there: with a two-pass backward while training, by one kernel for FEW numbers."""
    if x.device.type != "cpu":
        return rms_norm_plain(x, weight, eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return rms_norm_of_few(x, weight, eps) if x.numel() <= FEW else rms_norm_plain(x, weight, eps)
