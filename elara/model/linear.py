"""Matrix products with weights: torch's, but where its BLAS is slow and oneDNN, which torch brings as well, is not."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elara.device import device_name

ROWS, WORK = 3, 1 << 20  # from so many rows and multiplications on oneDNN's order of the weights pays for itself


@cache
def blas_is_slow() -> bool:
    """Whether float32 products go through MKL on an AMD processor, where oneDNN is 1.5-2.2 times as fast (Zen 5)."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and "AMD" in device_name()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., inputs), (outputs, inputs), (outputs) -> (..., outputs)."""
    if (
        not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= ROWS * x.shape[-1]
        and x.numel() * len(weight) >= WORK
        and not torch.is_autocast_enabled("cpu")
        and blas_is_slow()
    ):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., inputs) -> (..., outputs)."""
        return linear(x, self.weight, self.bias)
