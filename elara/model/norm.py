"""RMSNorm (arXiv 1910.07467) with its own backward: on a CPU, half the passes over memory that autograd would make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; under autocast the result has autocast's dtype."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(dtype)
    if not torch.is_grad_enabled():
        return (x * _inverse(x, eps).to(x.dtype)).mul_(weight.to(x.dtype)).to(dtype)
    out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return out


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), (..., 1): in three kernels, where torch's rms_norm launches eight on a CPU."""
    wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.addcmul(_constant(eps, wide, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for training too
        return torch.tensor(value, dtype=dtype, device=device)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        inverse = _inverse(x, eps)
        ctx.dtype, x = x.dtype, x.to(dtype)
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (x * inverse.to(dtype)).mul_(weight.to(dtype))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        width, wide = x.shape[-1], inverse.dtype
        product = (grad * x).reshape(-1, width)
        along = (product @ weight.to(x.dtype)).to(wide).view(inverse.shape)  # sum of grad * weight * x
        grad_weight = (inverse.view(1, -1).to(x.dtype) @ product).view(-1).to(weight.dtype)
        pull = along.mul_(inverse.pow(3)).div_(-width).to(x.dtype)
        grad_x = (grad * inverse.to(x.dtype)).mul_(weight.to(x.dtype)).addcmul_(x, pull)
        return grad_x.to(ctx.dtype), grad_weight, None, None


def norm_heads(x: Tensor, weights: Sequence[tuple[int, Tensor]], eps: float) -> Tensor:
    """RMSNorm of x (..., heads, head_dim) on a CPU and without gradients, in one go for heads of several weights.

    weights: how many heads have it, and the weight (head_dim).
    """
    out, first = x * _inverse(x, eps).to(x.dtype), 0
    for count, weight in weights:
        out.narrow(-2, first, count).mul_(weight.to(x.dtype))
        first += count
    return out


class RMSNorm(nn.Module):
    """Learned-scale RMSNorm over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
