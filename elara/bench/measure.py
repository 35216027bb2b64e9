"""Interleaved timing: a shared machine drifts, a ratio of neighbours does not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass
class Figure:
    """One line of the result. ratio: subject / reference, or reference / subject where `faster` (a speed-up).

    target: what the ratio is held against, at most (a cost) or at least (a speed-up). seconds: medians of both.
    low, high: quartiles of the ratio over the rounds.
    """

    name: str
    ratio: float
    low: float
    high: float
    target: float
    faster: bool
    subject_seconds: float
    reference_seconds: float
    note: str = ""

    @property
    def met(self) -> bool:
        return self.ratio >= self.target if self.faster else self.ratio <= self.target


def timed(run: Run) -> float:
    """Seconds of one call, the device's queue included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(
    name: str, subject: Run, reference: Run, *, target: float, faster: bool = False, rounds: int = 9, note: str = ""
) -> Figure:
    """Run both in turn, after two rounds that do not count, and take the median of the pairwise ratios."""
    pairs = [(timed(subject), timed(reference)) for _ in range(rounds + 2)][2:]
    ratios = sorted(r / s if faster else s / r for s, r in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Figure(
        name,
        statistics.median(ratios),
        quartiles[0],
        quartiles[2],
        target,
        faster,
        statistics.median(s for s, _ in pairs),
        statistics.median(r for _, r in pairs),
        note,
    )
