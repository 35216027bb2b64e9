"""Means over steps and ranks, and the names under which they are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from elara.model import CLEAN, MASK
from elara.training.balance import balance_stats

SECTIONS = {CLEAN: "clean", MASK: "mask"}


class Means(Metric):
    """Weighted means of named scalars: small tensor operations per update, nothing read back before `compute`."""

    full_state_update = False
    total: Tensor  # (2, names): sums, and the weights that they count

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("total", torch.zeros(2, len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Sequence[Tensor], weights: Sequence[Tensor] | Tensor | float = 1.0) -> None:
        """values: one scalar tensor per name; weights: how much each counts, e.g. its number of tokens, or all do."""
        row = torch.stack([value.detach().float() for value in values])
        counts = torch.ones_like(row)
        counts = counts * (torch.stack(list(weights)) if isinstance(weights, Sequence) else weights)
        self.total += torch.stack([row * counts, counts])

    def compute(self) -> Tensor:
        """(2, names): the means over all updates and ranks, and the weights that they count."""
        return torch.stack([self.total[0] / self.total[1], self.total[1]])

    def read(self) -> dict[str, float]:
        """The means by name as Python numbers, without those that nothing counts for; empties the metric."""
        means, counts = self.compute().view(2, -1).tolist()
        self.reset()
        return {name: mean for name, mean, count in zip(self.names, means, counts, strict=True) if count}


def loss_figures(section: str, loss_ar: float, chars_per_token: float | None) -> dict[str, float]:
    """Perplexity per token and bits per character that follow from an AR loss in nats per token."""
    figures = {f"{section}/perplexity": math.exp(min(loss_ar, 700.0))}
    if chars_per_token:
        figures[f"{section}/bits_per_char"] = loss_ar / math.log(2) / chars_per_token
    return figures


def moe_figures(load: Tensor, layers: Sequence[int]) -> dict[str, float]:
    """Balance of a load (moe layers, passes, sections, experts) by layer, recursion pass and section.

    Names: moe/layer1/pass0/clean/max_vio, .../entropy, .../dead and .../load0 ... (the fractions).
    """
    stats = {name: value.tolist() for name, value in balance_stats(load).items()}
    used = (load.sum(-1) > 0).tolist()
    figures = {}
    for i, layer in enumerate(layers):
        for p in range(load.shape[1]):
            for s, section in SECTIONS.items():
                if not used[i][p][s]:
                    continue  # no mask section without TiDAR, no deep pass in a shallow step
                prefix = f"moe/layer{layer}/pass{p}/{section}"
                for name in ("max_vio", "entropy", "dead"):
                    figures[f"{prefix}/{name}"] = stats[name][i][p][s]
                for e, fraction in enumerate(stats["fraction"][i][p][s]):
                    figures[f"{prefix}/load{e}"] = fraction
    return figures
