"""Pictures of a search: how it went, what mattered, where the good values lie."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from elara.report.style import BLUE, DARK, GREY, ORANGE, STYLE
from elara.sweep.config import SearchConfig
from elara.sweep.importance import Importance
from elara.sweep.records import Record, best, projected
from elara.sweep.space import Parameter

PALE = "#c9ced6"
GOOD_TO_BAD = LinearSegmentedColormap.from_list("good_to_bad", ["#1d4f86", BLUE, "#9dbbd9", "#e1e6ec"])


@dataclass(frozen=True)
class Search:
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


def draw(
    records: Sequence[Record], wanted: SearchConfig, space: Sequence[Parameter], shares: Sequence[Importance] | None
) -> dict[str, bytes]:
    """PNG files by name; those that there is something to show for."""
    search = Search(records, wanted, space, shares)
    if not search.those("complete") and not search.those("pruned"):
        return {}
    pictures: dict[str, Callable[[Search], Figure | None]] = {
        "history.png": history,
        "importance.png": importance,
        "slices.png": slices,
        "parallel.png": parallel,
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, picture in pictures.items():
            figure = picture(search)
            if figure is not None:
                figure.suptitle(f"search {wanted.study}", x=0.01, ha="left", color=GREY, fontsize=9)
                out = io.BytesIO()
                figure.savefig(out, bbox_inches="tight")
                drawn[name] = out.getvalue()
    return drawn


def history(search: Search) -> Figure:
    """The metric by trial with the best so far, and the curve of every trial."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    trials, curves = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _trials(search, trials)
    _curves(search, curves)
    return figure


def _trials(search: Search, axes: Axes) -> None:
    low, high = search.limits()
    for state, color, marker, label in (
        ("pruned", GREY, "x", "pruned (projected)"), ("complete", BLUE, "o", "trained to the end")
    ):  # fmt: skip
        found = {number: end for number, end in search.ends.items() if search.records_by_number[number].state == state}
        inside = {number: end for number, end in found.items() if low <= end <= high}
        if found:
            axes.plot(list(inside), list(inside.values()), marker, color=color, markersize=5, label=label)
        beyond = [number for number in found if number not in inside]
        edge, arrow = (high, "^") if search.minimizes else (low, "v")
        axes.plot(beyond, [edge] * len(beyond), arrow, color=color, markersize=5, alpha=0.6, clip_on=False)
    if failed := [record for record in search.records if record.state == "failed"]:
        axes.plot([record.number for record in failed], [0.0] * len(failed), "|", color="#b83b5e", markersize=9,
                  transform=axes.get_xaxis_transform(), clip_on=False, label="failed")  # fmt: skip
    complete = search.those("complete")
    if complete:
        better = np.minimum if search.minimizes else np.maximum
        so_far = better.accumulate([record.value or 0.0 for record in complete])
        numbers = [*(record.number for record in complete), max(record.number for record in search.records)]
        axes.step(numbers, [*so_far, so_far[-1]], where="post", color=ORANGE, linewidth=1.8, zorder=1,
                  label="best so far")  # fmt: skip
    if top := search.best:
        late = top.number > 0.8 * max(search.records_by_number)
        axes.annotate(f"{top.value:.4g}", (top.number, top.value or 0.0), ha="right" if late else "left",
                      xytext=(-6 if late else 6, -13 if search.minimizes else 7), textcoords="offset points",
                      color=ORANGE, fontweight="bold")  # fmt: skip
    axes.set(title="Trials in their order", xlabel="trial", ylabel=search.wanted.metric, ylim=(low, high))
    axes.set_xmargin(0.04)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def _curves(search: Search, axes: Axes) -> None:
    top = search.best
    labels: set[str] = set()
    for record in sorted(search.records, key=lambda r: (r is top, r.state == "complete")):
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
    everything = np.array([v for r in search.records for v in r.curve.values()])
    low, high = search.limits()
    if search.minimizes:
        high = max(high, float(np.quantile(everything, 0.9)))
    else:
        low = min(low, float(np.quantile(everything, 0.1)))
    axes.set(title="Curves of the trials", xlabel="optimizer steps", ylabel=search.wanted.metric, ylim=(low, high))
    steps = sorted({step for record in search.records for step in record.curve})
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


def importance(search: Search) -> Figure | None:
    """Share of the metric's spread that each key explains, with how far chance moves it."""
    if search.shares is None:
        return None
    shares = list(reversed(search.shares))
    figure = Figure(figsize=(7.5, 1.5 + 0.42 * len(shares)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shares))
    axes.barh(places, [share.share for share in shares], color=BLUE, height=0.62)
    for place, share in zip(places, shares, strict=True):
        axes.plot([share.low, share.high], [place, place], color=DARK, linewidth=1.2, solid_capstyle="butt")
        axes.plot([share.low, share.high], [place, place], "|", color=DARK, markersize=7)
        axes.annotate(f"{share.share:.0%}", (max(share.share, share.high), place), xytext=(7, 0), va="center",
                      textcoords="offset points", fontsize=9, color=DARK)  # fmt: skip
    count = len(search.ends)
    axes.set(title="What mattered", yticks=places, yticklabels=[share.key for share in shares],
             xlabel=f"share of the spread of {search.wanted.metric} over {count} trials that a key explains alone "
             "(fANOVA);\nlines: the middle 80 % over resampled trials; pruned ones as projected")  # fmt: skip
    axes.xaxis.label.set_fontsize(8.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlim(0, max(0.2, *(share.high for share in shares)) * 1.12)
    axes.grid(axis="y", visible=False)
    return figure


def slices(search: Search) -> Figure:
    """The metric over each key."""
    keys = search.by_importance()[:8]
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(0.9 + 2.9 * columns, 0.5 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    low, high = search.limits()
    for axes, parameter in zip(grid.flatten(), keys, strict=False):
        for number, end in search.ends.items():
            record = search.records_by_number[number]
            if parameter.key in record.values:
                value = float(np.clip(end, low, high))
                axes.plot(_place(parameter, record), value, clip_on=False, **_mark(record, search.best))
        _value_axis(parameter, axes)
        axes.set_title(parameter.key, fontsize=9.5)
        axes.set_ylim(low, high)
    for axes in grid.flatten()[len(keys) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(search.wanted.metric)
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


def _place(parameter: Parameter, record: Record) -> float:
    value = record.values[parameter.key]
    return float(parameter.choices.index(value)) if parameter.kind == "choice" else float(value)


def parallel(search: Search) -> Figure | None:
    """Every trial as a line over the keys, ending at the metric."""
    complete = [r for r in search.those("complete") if all(p.key in r.values for p in search.space)]
    if not complete:
        return None
    keys = list(reversed(search.by_importance()))  # the one that matters most stands beside the metric
    low, high = search.limits()
    figure = Figure(figsize=(2.2 + 1.75 * len(keys), 4.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    axes.set(xlim=(-0.25, len(keys) + 0.45), ylim=(-0.04, 1.04))
    axes.axis("off")

    def metric(record: Record) -> float:
        share = (float(record.value or 0.0) - low) / (high - low)
        return float(np.clip(share, 0, 1))

    for record in search.those("pruned"):
        if all(parameter.key in record.values for parameter in keys):
            axes.plot(*_smooth([_share(p, record) for p in keys]), color=PALE, linewidth=0.8, linestyle=(0, (3, 2)))
    top = search.best
    for record in sorted(complete, key=metric, reverse=search.minimizes):  # good ones on top
        shares = [*(_share(parameter, record) for parameter in keys), metric(record)]
        badness = metric(record) if search.minimizes else 1 - metric(record)
        best_style = {"color": ORANGE, "linewidth": 2.8, "zorder": 4}
        style = best_style if record is top else {"color": GOOD_TO_BAD(badness), "linewidth": 1.3, "zorder": 2}
        axes.plot(*_smooth(shares), **style, solid_capstyle="round")  # type: ignore[arg-type]
    for i, parameter in enumerate(keys):
        _upright(axes, i, parameter.key, _ticks(parameter))
    ends = [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")]
    worst = int(search.minimizes)
    if any(metric(record) == worst for record in complete):
        ends[worst] = (ends[worst][0], f"{ends[worst][1]} or worse")
    _upright(axes, len(keys), search.wanted.metric, ends, right=True)
    if top is not None:
        axes.annotate(f"{top.value:.4g}", (len(keys), metric(top)), xytext=(7, 0), textcoords="offset points",
                      va="center", color=ORANGE, fontweight="bold")  # fmt: skip
    axes.set_title("Trials over the keys; orange: the best, dark: good, dashed: pruned", pad=26)
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
    place = _place(parameter, record)
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
