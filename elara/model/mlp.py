"""The SwiGLU MLP (arXiv 2002.05202) with gate and up projections in one matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elara.model.linear import Linear


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input, and writes both halves of the gradient in place instead of concatenating them."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_both = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_both.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        return grad_both


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a last axis that holds gate, then up: (..., 2 * hidden) -> (..., hidden)."""
    if not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate_up)
    return out


class MLP(nn.Module):
    """Dense feed-forward layer: (..., inputs or n_embd) -> (..., n_embd) through `hidden` gated units."""

    def __init__(self, n_embd: int, hidden: int, inputs: int | None = None) -> None:
        super().__init__()
        self.gate_up = Linear(inputs or n_embd, 2 * hidden, bias=False)
        self.down = Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out
