"""Trials as the tables and pictures of a search need them, without Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Record:
    """What is known of a trial."""

    number: int
    state: str  # complete, pruned, failed, stopped or running
    value: float | None  # of the metric: the last one
    curve: dict[int, float]  # the metric by optimizer step
    values: dict[str, Any]  # searched values by key, as Optuna knows them
    overrides: list[str]  # the same as elara.train got them
    seconds: float
    host: str
    error: str | None


def best(records: Sequence[Record], direction: str) -> Record | None:
    """The best trial that trained to its end; None while there is none."""
    complete = [record for record in records if record.state == "complete" and record.value is not None]
    sign = 1 if direction == "minimize" else -1
    return min(complete, key=lambda record: (sign * (record.value or 0.0), record.number), default=None)


def projected(records: Sequence[Record]) -> dict[int, float]:
    """The metric at the end by trial: as it was, and for a pruned one as if it had gone on like the complete ones.

    To its last value comes the median of what the complete trials still gained from that step on. Pruned trials that
    no complete one can be compared with are left out.
    """
    complete = [record for record in records if record.state == "complete" and record.value is not None]
    ends = {record.number: record.value or 0.0 for record in complete}
    for record in records:
        if record.state == "pruned" and record.value is not None:
            step = max(record.curve)
            gains = [(other.value or 0.0) - other.curve[step] for other in complete if step in other.curve]
            if gains:
                ends[record.number] = record.value + median(gains)
    return ends


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
