"""Balance of the experts without an auxiliary loss, and the figures that tell whether it works.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): after every optimizer step the selection bias of an overloaded expert
falls by a fixed rate and that of an underloaded one rises.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from elara.model import CLEAN, ElaraLM, RoutingStats
from elara.model.moe import MoE


def balance_stats(load: Tensor) -> dict[str, Tensor]:
    """Figures of a load (..., experts): `fraction` (..., experts); `max_vio`, `entropy` (1 = uniform), `dead` (...).

    MaxVio = max load / mean load - 1 (arXiv 2408.15664, eq. 4); dead = experts that got nothing.
    """
    fraction = load / load.sum(-1, keepdim=True).clamp(min=1)
    experts = load.shape[-1]
    entropy = torch.special.entr(fraction).sum(-1) / torch.log(torch.tensor(float(max(experts, 2))))
    return {
        "fraction": fraction,
        "max_vio": fraction.amax(-1) * experts - 1,
        "entropy": entropy,
        "dead": (load == 0).sum(-1).float(),
    }


def add_loads(total: Tensor | None, load: Tensor) -> Tensor:
    """Sum of two loads (layers, passes, sections, experts); a pass that one of them lacks counts as zero there."""
    if total is None or total.shape == load.shape:
        return load if total is None else total + load
    longer, shorter = (load, total) if load.shape[1] > total.shape[1] else (total, load)
    longer = longer.clone()
    longer[:, : shorter.shape[1]] += shorter
    return longer


class LoadBalancer:
    """Counts loads over micro-batches and ranks and moves each layer's selection bias after an optimizer step.

    The counts live outside the model: as buffers, data-parallel training would overwrite them from rank 0.
    """

    def __init__(self, model: ElaraLM, rate: float) -> None:
        self.routers = [block.mlp.router for block in model.blocks if isinstance(block.mlp, MoE)]
        self.rate = rate
        self.load: Tensor | None = None  # (layers, passes, sections, experts) since the last step

    def add(self, routing: RoutingStats) -> None:
        """Count one micro-batch. A pass that another micro-batch lacks (sampled depth) counts as zero there."""
        self.load = add_loads(self.load, routing.load.detach())

    @torch.no_grad()
    def step(self) -> Tensor | None:
        """Move the biases and forget the counts. Returns the global load (layers, passes, sections, experts)."""
        load, self.load = self.load, None
        if load is None or not self.routers:
            return load
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        if self.rate:
            clean = load[:, :, CLEAN]  # (layers, passes, experts)
            move = self.rate * torch.sign(clean.mean(-1, keepdim=True) - clean)
            for router, change in zip(self.routers, move, strict=True):
                router.selection_bias[: len(change)] += change
        return load
