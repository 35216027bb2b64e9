"""The picture of how a search went: its trials in their order, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from elara.report.style import BLUE, GREY, ORANGE
from elara.sweep.view import View


def history(view: View) -> Figure:
    """The metric by trial with the best so far, and the curve of every trial."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    trials, curves = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _trials(view, trials)
    _curves(view, curves)
    return figure


def _trials(view: View, axes: Axes) -> None:
    low, high = view.limits()
    for state, color, marker, label in (
        ("pruned", GREY, "x", "pruned (projected)"), ("complete", BLUE, "o", "trained to the end")
    ):  # fmt: skip
        found = {number: end for number, end in view.ends.items() if view.records_by_number[number].state == state}
        inside = {number: end for number, end in found.items() if low <= end <= high}
        if found:
            axes.plot(list(inside), list(inside.values()), marker, color=color, markersize=5, label=label)
        beyond = [number for number in found if number not in inside]
        edge, arrow = (high, "^") if view.minimizes else (low, "v")
        axes.plot(beyond, [edge] * len(beyond), arrow, color=color, markersize=5, alpha=0.6, clip_on=False)
    if failed := [record for record in view.records if record.state == "failed"]:
        axes.plot([record.number for record in failed], [0.0] * len(failed), "|", color="#b83b5e", markersize=9,
                  transform=axes.get_xaxis_transform(), clip_on=False, label="failed")  # fmt: skip
    complete = view.those("complete")
    if complete:
        better = np.minimum if view.minimizes else np.maximum
        so_far = better.accumulate([record.value or 0.0 for record in complete])
        numbers = [*(record.number for record in complete), max(record.number for record in view.records)]
        axes.step(numbers, [*so_far, so_far[-1]], where="post", color=ORANGE, linewidth=1.8, zorder=1,
                  label="best so far")  # fmt: skip
    if top := view.best:
        late = top.number > 0.8 * max(view.records_by_number)
        axes.annotate(f"{top.value:.4g}", (top.number, top.value or 0.0), ha="right" if late else "left",
                      xytext=(-6 if late else 6, -13 if view.minimizes else 7), textcoords="offset points",
                      color=ORANGE, fontweight="bold")  # fmt: skip
    axes.set(title="Trials in their order", xlabel="trial", ylabel=view.wanted.metric, ylim=(low, high))
    axes.set_xmargin(0.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _curves(view: View, axes: Axes) -> None:
    top = view.best
    labels: set[str] = set()
    for record in sorted(view.records, key=lambda r: (r is top, r.state == "complete")):
        if not record.curve or record.state not in ("complete", "pruned"):
            continue
        steps, values = list(record.curve), list(record.curve.values())
        if record is top:
            style: dict[str, Any] = {"color": ORANGE, "linewidth": 2.4, "label": f"best, trial {record.number}"}
        elif record.state == "complete":
            style = {"color": BLUE, "linewidth": 1.1, "alpha": 0.6, "label": "trained to the end"}
        else:
            style = {"color": GREY, "linewidth": 1.0, "alpha": 0.75, "label": "pruned"}
            axes.plot(steps[-1], values[-1], "x", color=GREY, markersize=5)
        if len(steps) == 1 and record.state == "complete":
            style["marker"] = "o"
        if style["label"] in labels:
            del style["label"]
        else:
            labels.add(style["label"])
        axes.plot(steps, values, **style)
    everything = np.array([v for r in view.records for v in r.curve.values()])
    low, high = view.limits()
    if view.minimizes:
        high = max(high, float(np.quantile(everything, 0.9)))
    else:
        low = min(low, float(np.quantile(everything, 0.1)))
    axes.set(title="Curves of the trials", xlabel="optimizer steps", ylabel=view.wanted.metric, ylim=(low, high))
    steps = sorted({step for record in view.records for step in record.curve})
    if steps[-1] > 4 * steps[0]:  # a logarithmic axis shows where trials are given up as well as the end
        axes.set_xscale("log")
        axes.set_xticks(shown := _spread(steps), [str(step) for step in shown])
        axes.minorticks_off()
    _legend(axes)


def _spread(steps: Sequence[int]) -> list[int]:
    """Steps for the ticks of a logarithmic axis: the last one and such as lie well before each other."""
    shown = [steps[-1]]
    for step in reversed(steps):
        if step < 0.72 * shown[-1]:
            shown.append(step)
    return shown


def _legend(axes: Axes) -> None:
    """Below the diagram, where it hides nothing."""
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, columnspacing=1, handlelength=1.5)
