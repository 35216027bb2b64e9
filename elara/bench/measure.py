"""Interleaved timing: a shared machine drifts, a ratio of neighbours does not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]
WARM_UP = 2  # rounds that do not count; of long rounds the first alone
LONG = 2.0  # seconds


@dataclass
class Figure:
    """One line of the result.

    ratio: subject / reference, or reference / subject where `faster` (a speed-up); low, high: its quartiles.
    target: what the ratio is held against, at most (a cost) or at least (a speed-up); None = for information.
    subject, reference: medians, in `unit`s (s or bytes). limit: which measured limit of the machine `share` is of, by
    the subject: memory bandwidth or matmul; share_target: its least. tokens_per_second, mfu: of the subject, the latter
    where a GPU's peak is known. series, at: the curve that this figure is a point of, and where.
    """

    name: str
    ratio: float
    low: float
    high: float
    target: float | None
    faster: bool
    subject: float
    reference: float
    note: str = ""
    unit: str = "s"
    limit: str = ""
    share: float | None = None
    share_target: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    series: str = ""
    at: float | None = None

    @property
    def met(self) -> bool:
        """Whether every target that there is was reached."""
        if self.share_target is not None and (self.share or 0.0) < self.share_target:
            return False
        if self.target is None:
            return True
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


def race(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, by round: each round takes all of them in turn, after one or two that do not count."""
    first = sum(timed(run) for run in runs.values())
    uncounted = 0 if first > LONG else WARM_UP - 1
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(uncounted + rounds):
        for name, run in runs.items():
            found[name].append(timed(run))
    return {name: seconds[uncounted:] for name, seconds in found.items()}


def figure(
    name: str,
    subject: Sequence[float],
    reference: Sequence[float],
    *,
    target: float | None = None,
    faster: bool = False,
    note: str = "",
) -> Figure:
    """The median of the ratios of neighbours: seconds of the subject and of the reference, by round."""
    pairs = list(zip(subject, reference, strict=True))
    ratios = sorted(r / s if faster else s / r for s, r in pairs)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    middle = statistics.median
    return Figure(
        name, middle(ratios), quartiles[0], quartiles[2], target, faster, middle(subject), middle(reference), note
    )


def compare(
    name: str,
    subject: Run,
    reference: Run,
    *,
    target: float | None = None,
    faster: bool = False,
    rounds: int = 9,
    note: str = "",
) -> Figure:
    """Run both in turn and compare their times."""
    seconds = race({"subject": subject, "reference": reference}, rounds)
    return figure(name, seconds["subject"], seconds["reference"], target=target, faster=faster, note=note)
