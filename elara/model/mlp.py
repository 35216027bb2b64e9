"""The SwiGLU MLP (arXiv 2002.05202) with gate and up projections in one matrix."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a last axis that holds gate, then up."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class MLP(nn.Module):
    """Dense feed-forward layer: (..., n_embd) -> (..., n_embd) through `hidden` gated units."""

    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out
