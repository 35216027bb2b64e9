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
    """Weighted means of named scalars: one small tensor operation per update, nothing read back before `compute`."""

    full_state_update = False
    total: Tensor  # (names + 1), the last entry counts the weights

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("total", torch.zeros(len(self.names) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Sequence[Tensor], weight: Tensor | float = 1.0) -> None:
        """values: one scalar tensor per name; weight: how much this update counts, e.g. its number of tokens."""
        row = torch.stack([value.detach().float() for value in values] + [values[0].new_ones((), dtype=torch.float32)])
        self.total += row * weight

    def compute(self) -> Tensor:
        """(names + 1) means over all updates and ranks, and behind them what all updates counted."""
        return torch.cat([self.total[:-1] / self.total[-1], self.total[-1:]])

    def read(self) -> dict[str, float]:
        """The means by name as Python numbers, none while there was no update; empties the metric."""
        *means, count = self.compute().view(-1).tolist()
        self.reset()
        return dict(zip(self.names, means, strict=True)) if count else {}


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
