"""Matrix products with weights: torch's own, but where its BLAS is slow and oneDNN, which it brings as well, is not."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elara.device import device_name

ROWS, WORK = 3, 1 << 20  # from so many rows and multiplications on oneDNN's order of the weights pays for itself
FEW, WEIGHTS = 4, 1 << 14  # inference with up to so many rows and at least so many weights goes through `_few_rows`
PARTS = 8  # of the weights there


@cache
def blas_is_slow() -> bool:
    """Whether float32 products go through MKL on an AMD processor, where oneDNN is 1.5-2.2 times as fast (Zen 5)."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "AMD" in device_name()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., inputs), (outputs, inputs), (outputs) -> (..., outputs)."""
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # the compiler makes products of its own
        and blas_is_slow()
    ):
        trains, (outputs, inputs), size = torch.is_grad_enabled(), weight.shape, x.numel()
        if not trains and size <= FEW * inputs and outputs * inputs >= WEIGHTS and outputs % PARTS == 0:
            return _few_rows(x, weight, bias)
        if size >= ROWS * inputs and size * outputs >= WORK:
            if not trains:
                return _product(x, weight, bias)
            if bias is None:
                y: Tensor = _Product.apply(x, weight)
                return y
    return F.linear(x, weight, bias)


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A batch of products of weight's parts with the rows as columns: at the speed of memory (44-60 GB/s with 2 threads
    of Zen 5), where MKL's product of a matrix and a vector uses one thread (17) and oneDNN's 27-38."""
    rows, outputs = x.reshape(-1, x.shape[-1]), len(weight)
    y = torch.bmm(weight.unflatten(0, (PARTS, -1)), rows.t().expand(PARTS, -1, -1))
    y = y.view(outputs, len(rows)).t().reshape(*x.shape[:-1], outputs)
    return y if bias is None else y + bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Product(torch.autograd.Function):
    """oneDNN reads transposed matrices as they lie; all three products of a training step are twice as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_weight = _product(rows.t(), columns.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class Linear(nn.Linear):
    """A linear layer through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs)."""
        return linear(x, self.weight, self.bias)
