"""The picture of a sweep: every group's loss, best at the top, its curve beside it, and loss over numeric settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from elara.report.comparison import SEED, Comparison, Group
from elara.report.figures import Panel
from elara.report.measures import as_number, short_keys, tidy
from elara.report.metrics import Values, points, smooth
from elara.report.outcome import Outcome
from elara.report.style import DARK, GREY, PALETTE, STYLE

MOST = 32  # groups in the ranking; of more, the best are shown
MOST_LINES = 6  # lines over a numeric setting that are told apart by colour
RANKS = LinearSegmentedColormap.from_list("ranks", ["#2f6fb0", "#3a8f5c", "#c9a227", "#d9722b", "#b83b5e"])
LETTER = 0.083  # inches that a letter of a label takes
RANKING = 3.8  # inches that the ranking's axes take, about


def draw(comparison: Comparison, path: Path) -> bool:
    """Write the picture; False, and nothing written, where no finished job has a loss."""
    found = panels(comparison)
    if not found:
        return False
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = _compose(found)
        figure.suptitle(_heading(comparison), x=0.01, ha="left", color=GREY, fontsize=9)
        figure.savefig(path, bbox_inches="tight")
    return True


def _compose(found: Sequence[Panel]) -> Figure:
    """The ranking with the curves at its right; further panels below both, or below the curves where a long ranking
    leaves room there."""
    ranking, curves, *courses = found
    long = ranking.size[1] > curves.size[1] + 2
    stacked = [curves, *courses] if long else [curves]
    heights = [panel.size[1] for panel in stacked]
    top, width = max(ranking.size[1], sum(heights)), max(panel.size[0] for panel in stacked)
    rows = [top] if long or not courses else [top, max(panel.size[1] for panel in courses)]
    figure = Figure(figsize=(ranking.size[0] + width, sum(rows)), layout="constrained")
    upper, *lower = figure.subfigures(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
    left, right = upper.subfigures(1, 2, width_ratios=[ranking.size[0], width])
    places = [left, *right.subfigures(len(stacked), 1, height_ratios=heights, squeeze=False)[:, 0]]
    for part in lower:
        places += list(part.subfigures(1, len(courses), squeeze=False)[0])
    for panel, place in zip(found, places, strict=True):
        panel.draw(place)
    return figure


def panels(comparison: Comparison) -> list[Panel]:
    """Ranking, curves, and one panel for every numeric setting with at least three values; [] without a loss."""
    sweep = _Sweep(comparison)
    if not sweep.groups:
        return []
    rows = len(sweep.shown)
    found = [
        Panel((sweep.label_width + RANKING + 0.3, max(1.5 + (0.27 if rows > 8 else 0.36) * rows, 3.9)), sweep.ranking),
        Panel((5.6, 3.9), sweep.curves),
    ]
    for i, key in enumerate(comparison.group_keys):
        if sweep.numbers(i) is not None and len(found) < 5:
            found.append(Panel((5.6, 3.5), lambda figure, i=i, key=key: sweep.course(i, key, figure)))  # type: ignore[misc]
    return found


@dataclass(frozen=True)
class _Sweep:
    """What the panels share: the groups that have a loss, best first, and their colours."""

    comparison: Comparison

    @cached_property
    def groups(self) -> list[Group]:
        return [group for group in self.comparison.groups if group.loss]

    @property
    def shown(self) -> list[Group]:
        return self.groups[:MOST]

    @cached_property
    def losses(self) -> list[float]:
        return [group.loss.mean for group in self.groups if group.loss]

    @property
    def label_width(self) -> float:
        """Inches that the settings before the ranking take."""
        return LETTER * (sum(self._letters) + 2 * len(self._letters))

    @cached_property
    def _letters(self) -> list[int]:
        """Letters of every column of settings."""
        names = short_keys(self.comparison.group_keys)
        return [
            max(len(name), *(len(_cell(group.values[i])) for group in self.shown))
            for i, name in enumerate(names.values())
        ]

    def colour(self, place: int) -> str | tuple[float, float, float, float]:
        """Of the group at `place`: colours that differ where they are few, else from the best's to the worst's."""
        if len(self.groups) <= len(PALETTE):
            return PALETTE[place]
        return RANKS(place / (len(self.shown) - 1)) if place < MOST else GREY

    def ranking(self, figure: FigureBase) -> None:
        """A row per group: its settings, its loss with the deviation over seeds, the seeds as small points."""
        axes = figure.subplots()
        limit, best = _limit(self.losses), self.losses[0]
        axes.axvline(best, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        ends = []
        for row, group in enumerate(self.shown):
            low, high, words = self._row(axes, row, group, min(limit, self.losses[row]))
            ends.append((low, high, LETTER * (len(words) + 2)))
        start = min(low for low, _, _ in ends)
        widest = max(high for _, high, _ in ends) - start or 0.02 * abs(start) or 1.0
        start -= 0.05 * widest
        # so far that each row's words fit behind its end
        stop = max(start + (high - start) / max(1 - inches / RANKING, 0.2) for _, high, inches in ends)
        axes.set_xlim(start, max(stop, start + 1.1 * widest))
        axes.set_ylim(len(self.shown) - 0.4, -0.6)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines["left"].set_visible(False)
        more = f"; the best {len(self.shown)} of {len(self.groups)}" if len(self.shown) < len(self.groups) else ""
        axes.set(title="Held-out loss", xlabel=f"nats per token at the best validation{more}")
        self._settings(axes)

    def _row(self, axes: Axes, row: int, group: Group, at: float) -> tuple[float, float, str]:
        """Draw one group at loss `at`; returns from where to where it goes, and the words behind it."""
        assert group.loss is not None
        colour, loss = self.colour(row), group.loss
        low = high = at
        axes.hlines(row, self.losses[0], at, color=colour, linewidth=2.2, alpha=0.35)
        if at < loss.mean:
            axes.plot(at, row, ">", color=colour, markersize=7)
        else:
            axes.plot(at, row, "o", color=colour, markersize=7)
            if loss.count > 1:
                seeds = [job.best_loss for job in group.jobs if job.best_loss is not None]
                axes.plot(seeds, [row] * len(seeds), "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
                axes.errorbar(at, row, xerr=loss.deviation, color=colour, capsize=3, linewidth=1.4)
                low, high = min(at - loss.deviation, *seeds), max(at + loss.deviation, *seeds)
        words = f"{loss.mean:.3f}" if loss.count == 1 else f"{loss.mean:.3f} ± {loss.deviation:.3f}"
        axes.annotate(words, (high, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9,
                      fontweight="bold" if row == 0 else "normal")  # fmt: skip
        return low, high, words

    def _settings(self, axes: Axes) -> None:
        """The settings as columns of text before the rows."""
        names = list(short_keys(self.comparison.group_keys).values())
        rows = axes.get_yaxis_transform()
        right = -6.0  # points left of the axes
        for i in reversed(range(len(names))):
            right -= 72 * LETTER * (self._letters[i] + 2)
            axes.annotate(names[i], (0, 1), xycoords="axes fraction", xytext=(right, 6), textcoords="offset points",
                          color=GREY, fontsize=9)  # fmt: skip
            for row, group in enumerate(self.shown):
                axes.annotate(_cell(group.values[i]), (0, row), xycoords=rows, xytext=(right, 0), fontsize=9,
                              textcoords="offset points", va="center", annotation_clip=False,
                              fontweight="bold" if row == 0 else "normal")  # fmt: skip

    def curves(self, figure: FigureBase) -> None:
        """Loss over the steps in the colours of the ranking; seeds thin, their mean thick."""
        axes = figure.subplots()
        held = sum(len(points(job.columns, "val/loss_ar")[0]) > 1 for job in self._jobs) > 0
        take: Callable[[Outcome], tuple[Values, Values]] = _held_out if held else _training
        ends, lows = [], []
        for place, group in reversed(list(enumerate(self.groups))):
            colour = self.colour(place)
            lines = [line for job in group.jobs if len((line := take(job))[0])]
            several = len(lines) > 1
            for steps, values in lines:
                axes.plot(steps, values, color=colour, linewidth=0.8 if several else 1.5, alpha=0.4 if several else 0.9,
                          zorder=3 - place / len(self.groups))  # fmt: skip
                ends.append(values[len(values) // 4])
                lows.append(values.min())
            if several and len({tuple(steps) for steps, _ in lines}) == 1:
                axes.plot(lines[0][0], np.mean([values for _, values in lines], axis=0), color=colour, linewidth=1.9)
        if lows:
            low, high = min(lows), min(max(ends), _limit(sorted(ends)))
            axes.set_ylim(low - 0.06 * (high - low) - 1e-3, high + 0.12 * (high - low) + 1e-3)
        what = "Held-out loss over the steps" if held else "Training loss over the steps, smoothed"
        axes.set(title=what, xlabel="optimizer steps", ylabel="nats per token")

    @property
    def _jobs(self) -> list[Outcome]:
        return [job for group in self.groups for job in group.jobs]

    def numbers(self, i: int) -> list[float] | None:
        """The distinct values of the i-th key in order, if they are numbers and at least three."""
        found = [as_number(group.values[i]) for group in self.groups]
        numbers = sorted({number for number in found if number is not None})
        return numbers if len(numbers) >= 3 and None not in found and self._key(i) != SEED else None

    def _key(self, i: int) -> str:
        return self.comparison.group_keys[i]

    def course(self, i: int, key: str, figure: FigureBase) -> None:
        """Loss against the i-th key's value, a line for every combination of the others."""
        axes = figure.subplots()
        lines: dict[str, list[Group]] = {}
        names = list(short_keys(self.comparison.group_keys).values())
        for group in self.groups:
            others = [f"{names[k]}={_cell(v)}" for k, v in enumerate(group.values) if k != i]
            lines.setdefault(" ".join(others), []).append(group)
        connected = [line for line in lines.values() if len(line) > 1]
        told_apart = len(lines) <= MOST_LINES and len(connected) == len(lines)
        for place, (words, line) in enumerate(lines.items()):
            line.sort(key=lambda group: float(group.values[i]))
            spreads = [group.loss for group in line if group.loss]
            errors = [0.0 if math.isnan(spread.deviation) else spread.deviation for spread in spreads]
            axes.errorbar([float(group.values[i]) for group in line], [spread.mean for spread in spreads],
                          yerr=errors if any(errors) else None, fmt="o-", markersize=5, capsize=3,
                          linewidth=1.5 if told_apart else 0.9, label=words or None,
                          color=PALETTE[place if told_apart else 0], alpha=1 if told_apart else 0.6)  # fmt: skip
        best = self.groups[0]
        axes.plot(float(best.values[i]), self.losses[0], "o", markersize=11, markerfacecolor="none",
                  markeredgecolor=DARK, markeredgewidth=1.4, zorder=5)  # fmt: skip
        low, limit = self.losses[0], _limit(self.losses)
        top = max(loss for loss in self.losses if loss <= limit)
        axes.set_ylim(low - 0.1 * (top - low) - 1e-3, top + 0.15 * (top - low) + 1e-3)
        self._scale(axes, self.numbers(i) or [])
        axes.set(title=f"Loss over {names[i]}", xlabel=key, ylabel="best held-out loss")
        if told_apart and len(lines) > 1:
            axes.legend(fontsize=8)

    @staticmethod
    def _scale(axes: Axes, numbers: Sequence[float]) -> None:
        """A logarithmic axis for values that are spread geometrically; ticks at the values where they are few."""
        if _geometric(numbers):
            axes.set_xscale("log")
        axes.margins(x=0.06)
        if len(numbers) <= 8:
            axes.set_xticks(numbers, [f"{number:.4g}" for number in numbers])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())


def _cell(value: str) -> str:
    value = tidy(value) or "-"
    return value if len(value) <= 24 else value[:23] + "…"


def _heading(comparison: Comparison) -> str:
    """The sweep's name, and what the picture leaves out."""
    left_out = len(comparison.jobs) - sum(len(group.jobs) for group in comparison.groups if group.loss)
    note = f"   ({left_out} of {len(comparison.jobs)} jobs are not in the picture: not finished)" if left_out else ""
    return comparison.title + note


def _limit(losses: Sequence[float]) -> float:
    """Where an axis may end: losses (in order) far above most of the others would squeeze those together."""
    if len(losses) < 4:
        return math.inf
    bulk = losses[int(0.75 * (len(losses) - 1))] - losses[0]
    return losses[0] + 3 * bulk if bulk > 0 else math.inf


def _geometric(numbers: Sequence[float]) -> bool:
    """Whether numbers (in order) span a factor of 4 and lie far more evenly on a logarithmic axis than a plain one."""
    if not numbers or numbers[0] <= 0 or numbers[-1] / numbers[0] < 4:
        return False

    def from_middle(values: Values) -> float:
        return abs(float(np.median(values) - (values[0] + values[-1]) / 2)) / float(values[-1] - values[0])

    values = np.array(numbers)
    return from_middle(np.log(values)) < 0.6 * from_middle(values)


def _held_out(job: Outcome) -> tuple[Values, Values]:
    return points(job.columns, "val/loss_ar")


def _training(job: Outcome) -> tuple[Values, Values]:
    steps, values = points(job.columns, "train/loss_ar")
    return steps, smooth(values)
