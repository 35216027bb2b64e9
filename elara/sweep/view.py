"""What the pictures of a search are drawn from, and how a value lies on its axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from elara.sweep.config import SearchConfig
from elara.sweep.importance import Importance
from elara.sweep.records import Record, best, projected
from elara.sweep.space import Parameter


@dataclass(frozen=True)
class View:
    """What the pictures are drawn from."""

    records: Sequence[Record]
    wanted: SearchConfig
    space: Sequence[Parameter]
    shares: Sequence[Importance] | None

    @property
    def best(self) -> Record | None:
        return best(self.records, self.wanted.direction)

    @property
    def minimizes(self) -> bool:
        return self.wanted.direction == "minimize"

    def those(self, state: str) -> list[Record]:
        return [record for record in self.records if record.state == state and record.value is not None]

    @cached_property
    def ends(self) -> dict[int, float]:
        """The metric at the end by trial, projected for pruned ones."""
        return projected(self.records) or {record.number: record.value or 0.0 for record in self.those("pruned")}

    @cached_property
    def records_by_number(self) -> dict[int, Record]:
        return {record.number: record for record in self.records}

    def by_importance(self) -> list[Parameter]:
        """Keys that matter first, where that is known."""
        order = {share.key: i for i, share in enumerate(self.shares or ())}
        return sorted(self.space, key=lambda parameter: order.get(parameter.key, 0))

    def limits(self) -> tuple[float, float]:
        """A range of the metric that shows the good end well: the worst trials may leave it."""
        values = np.array([record.value for record in self.those("complete") or self.those("pruned")], dtype=float)
        if not self.minimizes:
            values = -values
        low, high = values.min(), values.max()
        if len(values) > 4:
            high = min(high, low + 4 * float(np.median(values) - low) + 1e-9)
        margin = max(0.08 * (high - low), 1e-3 * abs(low), 1e-9)
        low, high = low - margin, high + margin
        return (float(low), float(high)) if self.minimizes else (float(-high), float(-low))


def position(parameter: Parameter, record: Record) -> float:
    """A trial's value as a number: itself, or the index of the choice."""
    value = record.values[parameter.key]
    return float(parameter.choices.index(value)) if parameter.kind == "choice" else float(value)
