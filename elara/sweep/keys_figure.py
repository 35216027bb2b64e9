"""Pictures of the searched keys: which of them mattered, and the metric over the values of each."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elara.report.style import BLUE, DARK, GREY, ORANGE
from elara.sweep.records import Record
from elara.sweep.space import Parameter
from elara.sweep.view import View, position


def importance(view: View) -> Figure | None:
    """Share of the metric's spread that each key explains, with how far chance moves it."""
    if view.shares is None:
        return None
    shares = list(reversed(view.shares))
    figure = Figure(figsize=(7.5, 1.5 + 0.42 * len(shares)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shares))
    axes.barh(places, [share.share for share in shares], color=BLUE, height=0.62)
    for place, share in zip(places, shares, strict=True):
        axes.plot([share.low, share.high], [place, place], color=DARK, linewidth=1.2, solid_capstyle="butt")
        axes.plot([share.low, share.high], [place, place], "|", color=DARK, markersize=7)
        axes.annotate(f"{share.share:.0%}", (max(share.share, share.high), place), xytext=(7, 0), va="center",
                      textcoords="offset points", fontsize=9, color=DARK)  # fmt: skip
    count = len(view.ends)
    axes.set(title="What mattered", yticks=places, yticklabels=[share.key for share in shares],
             xlabel=f"share of the spread of {view.wanted.metric} over {count} trials that a key explains alone "
             "(fANOVA);\nlines: the middle 80 % over resampled trials; pruned ones as projected")  # fmt: skip
    axes.xaxis.label.set_fontsize(8.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlim(0, max(0.2, *(share.high for share in shares)) * 1.12)
    axes.grid(axis="y", visible=False)
    return figure


def slices(view: View) -> Figure:
    """The metric over each key."""
    keys = view.by_importance()[:8]
    columns = len(keys) if len(keys) <= 4 else -(-len(keys) // 2)
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(0.9 + 2.9 * columns, 0.5 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    low, high = view.limits()
    for axes, parameter in zip(grid.flatten(), keys, strict=False):
        for number, end in view.ends.items():
            record = view.records_by_number[number]
            if parameter.key in record.values:
                mark = _mark(record, view.best)
                if not low <= end <= high:
                    mark |= {"marker": "^" if end > high else "v", "alpha": 0.6}
                axes.plot(position(parameter, record), np.clip(end, low, high), clip_on=False, **mark)
        _value_axis(parameter, axes)
        axes.set_title(parameter.key, fontsize=9.5)
        axes.set_ylim(low, high)
    for axes in grid.flatten()[len(keys) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(view.wanted.metric)
    figure.supxlabel("orange: the best trial; crosses: pruned ones, as if they had gone on like the others",
                     fontsize=8.5, color=GREY)  # fmt: skip
    return figure


def _mark(record: Record, top: Record | None) -> dict[str, Any]:
    if record.state == "pruned":
        return {"marker": "x", "color": GREY, "markersize": 4.5, "zorder": 2}
    if record is top:
        return {"marker": "o", "color": ORANGE, "markersize": 7, "zorder": 4}
    return {"marker": "o", "color": BLUE, "markersize": 4.5, "zorder": 3}


def _value_axis(parameter: Parameter, axes: Axes) -> None:
    if parameter.kind == "choice":
        axes.set_xticks(range(len(parameter.choices)), parameter.choices, fontsize=8)
        axes.set_xlim(-0.5, len(parameter.choices) - 0.5)
        return
    if parameter.log:
        axes.set_xscale("log")
        axes.set_xlim(parameter.low / 1.1, parameter.high * 1.1)
    else:
        margin = 0.04 * (parameter.high - parameter.low)
        axes.set_xlim(parameter.low - margin, parameter.high + margin)
    axes.tick_params(axis="x", labelsize=8)
