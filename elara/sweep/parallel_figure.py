"""The picture of all keys at once: every trial a line over parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from elara.report.style import BLUE, DARK, GREY, ORANGE
from elara.sweep.records import Record
from elara.sweep.space import Parameter
from elara.sweep.view import View, position

PALE = "#c9ced6"
GOOD_TO_BAD = LinearSegmentedColormap.from_list("good_to_bad", ["#1d4f86", BLUE, "#9dbbd9", "#e1e6ec"])


def parallel(view: View) -> Figure | None:
    """Every trial as a line over the keys, ending at the metric."""
    complete = [r for r in view.those("complete") if all(p.key in r.values for p in view.space)]
    if not complete:
        return None
    keys = list(reversed(view.by_importance()))  # the one that matters most stands beside the metric
    low, high = view.limits()
    figure = Figure(figsize=(2.2 + 1.75 * len(keys), 4.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    axes.set(xlim=(-0.25, len(keys) + 0.45), ylim=(-0.04, 1.04))
    axes.axis("off")

    def metric(record: Record) -> float:
        share = (float(record.value or 0.0) - low) / (high - low)
        return float(np.clip(share, 0, 1))

    for record in view.those("pruned"):
        if all(parameter.key in record.values for parameter in keys):
            axes.plot(*_smooth([_share(p, record) for p in keys]), color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
    top = view.best
    for record in sorted(complete, key=metric, reverse=view.minimizes):  # good ones on top
        shares = [*(_share(parameter, record) for parameter in keys), metric(record)]
        badness = metric(record) if view.minimizes else 1 - metric(record)
        best_style = {"color": ORANGE, "linewidth": 2.8, "zorder": 4}
        style = best_style if record is top else {"color": GOOD_TO_BAD(badness), "linewidth": 1.3, "zorder": 2}
        axes.plot(*_smooth(shares), **style, solid_capstyle="round")  # type: ignore[arg-type]
    for i, parameter in enumerate(keys):
        _upright(axes, i, parameter.key, _ticks(parameter))
    ends = [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")]
    worst = int(view.minimizes)
    if any(metric(record) == worst for record in complete):
        ends[worst] = (ends[worst][0], f"{ends[worst][1]} or worse")
    _upright(axes, len(keys), view.wanted.metric, ends, right=True)
    if top is not None:
        axes.annotate(f"{top.value:.4g}", (len(keys), metric(top)), xytext=(7, 0), textcoords="offset points",
                      va="center", color=ORANGE, fontweight="bold")  # fmt: skip
    axes.set_title("Trials over the keys", pad=26)
    figure.supxlabel("orange: the best trial; dark: good; dashed: pruned", fontsize=8.5, color=GREY)
    return figure


def _upright(axes: Axes, place: int, name: str, ticks: Sequence[tuple[float, str]], *, right: bool = False) -> None:
    axes.plot([place, place], [0, 1], color=DARK, linewidth=1.0, zorder=3)
    axes.text(place, 1.075, name, ha="center", fontsize=8.5, fontweight="bold")
    for height, label in ticks:
        axes.plot([place - 0.02, place + 0.02], [height, height], color=DARK, linewidth=1.0, zorder=3)
        axes.text(place + (0.05 if right else -0.05), height, label, fontsize=8, va="center", color=DARK, zorder=5,
                  ha="left" if right else "right",
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    if parameter.kind == "choice":
        return [(i / (len(parameter.choices) - 1), choice) for i, choice in enumerate(parameter.choices)]
    values = [parameter.low, parameter.high]
    if parameter.log:
        powers = 10.0 ** np.arange(np.ceil(np.log10(parameter.low)), np.floor(np.log10(parameter.high)) + 1)
        values += [float(power) for power in powers]
    else:
        values += [(parameter.low + parameter.high) / 2]
    ticks: list[tuple[float, str]] = []
    for value in values:
        height = _height(parameter, value)
        if all(abs(height - other) > 0.08 for other, _ in ticks):
            ticks.append((height, f"{value:.4g}"))
    return ticks


def _share(parameter: Parameter, record: Record) -> float:
    """How high on its axis a trial's value lies, 0 to 1."""
    place = position(parameter, record)
    return place / (len(parameter.choices) - 1) if parameter.kind == "choice" else _height(parameter, place)


def _height(parameter: Parameter, value: float) -> float:
    low, high = parameter.low, parameter.high
    if parameter.log:
        value, low, high = np.log(value), np.log(low), np.log(high)
    return float((value - low) / (high - low))


def _smooth(heights: Sequence[float]) -> tuple[Any, Any]:
    """A line through the heights that leaves every axis level, so that crossing lines can be told apart."""
    t = np.linspace(0, 1, 24)
    ease = t * t * (3 - 2 * t)
    xs = [i + t for i in range(len(heights) - 1)]
    ys = [a + (b - a) * ease for a, b in pairwise(heights)]
    return (np.concatenate(xs), np.concatenate(ys)) if xs else ([0.0], [heights[0]])
