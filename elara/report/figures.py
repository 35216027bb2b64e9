"""Pictures of one run, drawn from its metrics.csv."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, FigureBase

from elara.report.metrics import Columns, Values, points, read_metrics, smooth
from elara.report.style import BLUE, GREEN, GREY, ORANGE, PALETTE, STYLE

HEADS = {"ar": "Next token (autoregressive head)", "diffusion": "Draft (diffusion head)"}  # in losses' names


@dataclass(frozen=True)
class Panel:
    """One diagram: `draw` fills an empty figure, or a part of one; size: width and height in inches that suit it."""

    size: tuple[float, float]
    draw: Callable[[FigureBase], None]


def panels(columns: Columns) -> dict[str, list[Panel]]:
    """The diagrams that there are figures for: loss, training, experts, acceptance."""
    # a run that went on with fewer steps keeps the names of figures that it has not come to again
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    every = {
        "loss": _loss_panels(columns),
        "training": _training_panels(columns),
        "experts": _expert_panels(columns),
        "acceptance": _draft_panels(columns),
    }
    return {name: found for name, found in every.items() if found}


def draw_all(metrics: Path, folder: Path, title: str) -> list[Path]:
    """Draw every picture that `metrics` has figures for into `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, found in panels(read_metrics(metrics)).items():
            drawn.append(folder / f"{name}.png")
            _compose(found, title, stacked=name == "experts").savefig(drawn[-1], bbox_inches="tight")
    return drawn


def _compose(found: Sequence[Panel], title: str, *, stacked: bool) -> Figure:
    """The panels below or beside each other, under one small heading."""
    widths, heights = [panel.size[0] for panel in found], [panel.size[1] for panel in found]
    if stacked:
        figure = Figure(figsize=(max(widths), sum(heights)), layout="constrained")
        places = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
    else:
        figure = Figure(figsize=(sum(widths), max(heights)), layout="constrained")
        places = figure.subfigures(1, len(found), width_ratios=widths, squeeze=False)
    for panel, place in zip(found, places.flatten(), strict=True):
        panel.draw(place)
    figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=9)
    return figure


def _loss_panels(columns: Columns) -> list[Panel]:
    losses = [name.removeprefix("train/loss_") for name in columns if name.startswith("train/loss_")]
    heads = [Panel((5.6, 4.0), partial(_loss, columns, head)) for head in HEADS if head in losses]
    teachers = [name for name in losses if name not in HEADS]
    return [*heads, Panel((5.6, 4.0), partial(_teachers, columns, teachers))] if teachers else heads


def _loss(columns: Columns, head: str, figure: FigureBase) -> None:
    """Training and held-out loss of one head over the steps."""
    axes = figure.subplots()
    steps, values = points(columns, f"train/loss_{head}")
    axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values), color=BLUE, linewidth=1.6, label="training, smoothed")
    held_steps, held = points(columns, f"val/loss_{head}")
    if len(held):
        axes.plot(held_steps, held, "o-", color=ORANGE, markersize=4, linewidth=1.4, label="held-out text")
        best = int(np.argmin(held))
        axes.annotate(f"{held[best]:.3f}", (held_steps[best], held[best]), textcoords="offset points",
                      xytext=(0, 9), ha="right", color=ORANGE, fontweight="bold")  # fmt: skip
    axes.set_ylim(*_limits(np.concatenate([smooth(values), held])))
    axes.set(title=HEADS[head], xlabel="optimizer steps", ylabel="cross entropy (nats per token)")
    axes.legend()


def _teachers(columns: Columns, names: Sequence[str], figure: FigureBase) -> None:
    """Divergence from every teacher, of both heads, over the steps."""
    axes = figure.subplots()
    shown = []
    for name in names:
        steps, values = points(columns, f"train/loss_{name}")
        shown.append(smooth(values))
        label = name.replace("_diffusion", ", drafts").replace("_on_policy", ", on policy")
        axes.plot(steps, shown[-1], linewidth=1.6, label=label)
    axes.set_ylim(*_limits(np.concatenate(shown)))
    axes.set(title="Teachers", xlabel="optimizer steps", ylabel="divergence (nats per token), smoothed")
    axes.legend()


def _training_panels(columns: Columns) -> list[Panel]:
    every = [
        ("train/lr", "Learning rate", "rate of the first group"),
        ("train/grad_norm", "Gradient norm", "L2 norm before clipping"),
        ("train/tokens_per_second", "Speed", "tokens per second"),
    ]
    there = [panel for panel in every if len(points(columns, panel[0])[0])]
    return [Panel((4.0, 3.2), partial(_course, columns, *panel)) for panel in there]


def _course(columns: Columns, name: str, heading: str, label: str, figure: FigureBase) -> None:
    axes = figure.subplots()
    steps, values = points(columns, name)
    axes.plot(steps, values, color=GREEN, linewidth=1.4)
    axes.set(title=heading, xlabel="optimizer steps", ylabel=label)
    axes.set_ylim(0, float(np.quantile(values, 0.99)) * 1.15 or 1.0)


def _expert_panels(columns: Columns) -> list[Panel]:
    places = _moe_places(columns)
    if not places:
        return []
    return [
        Panel((9.0, 0.85 * len(places) + 1.2), partial(_load_maps, columns, places)),
        Panel((9.0, 2.8), partial(_max_vio, columns, places)),
    ]


def _load_maps(columns: Columns, places: Sequence[str], figure: FigureBase) -> None:
    """Load of every expert over time, a heat map for each layer and pass."""
    rows = np.atleast_1d(figure.subplots(len(places), 1, sharex=True))
    colours = ScalarMappable(TwoSlopeNorm(1.0, 0.0, 2.0), "RdBu_r")
    for axes, place in zip(rows, places, strict=True):
        steps, loads = _loads(columns, place)
        experts = len(loads)
        edges = np.concatenate([[steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)], steps])
        axes.pcolormesh(edges, np.arange(experts + 1) - 0.5, loads * experts, cmap=colours.cmap, norm=colours.norm,
                        rasterized=True)  # fmt: skip
        axes.set_ylabel(_place_words(place), rotation=0, ha="right", va="center", fontsize=9)
        axes.set_yticks([0, experts - 1])
        axes.grid(False)
    rows[0].set_title("Load of each expert (1 = fair share)")
    rows[-1].set_xlabel("optimizer steps")
    figure.colorbar(colours, ax=list(rows), label="load / fair share", extend="max",
                    shrink=min(0.8, 3.5 / len(places)))  # fmt: skip


def _max_vio(columns: Columns, places: Sequence[str], figure: FigureBase) -> None:
    axes = figure.subplots()
    for i, place in enumerate(places):
        steps, values = points(columns, f"{place}/max_vio")
        axes.plot(steps, smooth(values), linewidth=1.4, label=_place_words(place, line=True),
                  color=PALETTE[i % len(PALETTE)], linestyle="-" if i < len(PALETTE) else "--")  # fmt: skip
    axes.set(title="MaxVio: excess of the fullest expert", xlabel="optimizer steps", ylabel="max load / mean load - 1")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, ncols=2)


def _draft_panels(columns: Columns) -> list[Panel]:
    if not _reach(columns):
        return []
    return [Panel((5.0, 3.6), partial(_acceptance, columns)), Panel((5.0, 3.6), partial(_tokens_per_forward, columns))]


def _acceptance(columns: Columns, figure: FigureBase) -> None:
    """How many drafted tokens stood at the last validation, by position."""
    final = _reach(columns)
    positions = [1, *final]
    shares = [1.0, *final.values()]
    axes = figure.subplots()
    shown = axes.bar(positions, shares, color=[GREY] + [BLUE] * len(final), width=0.7)
    axes.bar_label(shown, [f"{share:.0%}" for share in shares], padding=2)
    axes.set(title="Accepted up to position", xlabel="position in the draft (the first comes from the AR head)",
             ylabel="share of drafts", ylim=(0, 1.1), xticks=positions)  # fmt: skip


def _tokens_per_forward(columns: Columns, figure: FigureBase) -> None:
    axes = figure.subplots()
    steps, values = points(columns, "val/tokens_per_forward")
    axes.plot(steps, values, "o-", color=ORANGE, markersize=4)
    axes.set(title="Tokens per forward pass", xlabel="optimizer steps", ylabel="tokens (autoregressive: 1)")
    axes.set_ylim(bottom=min(1.0, float(values.min())) - 0.05)


def _reach(columns: Columns) -> dict[int, float]:
    """Share of the newest drafts that stood up to a position, by position from the second on."""
    found = {int(match[1]): name for name in columns if (match := re.fullmatch(r"val/accept/(\d+)", name))}
    series = {position: points(columns, found[position])[1] for position in sorted(found)}
    return {position: float(values[-1]) for position, values in series.items() if len(values)}


def _limits(values: Values) -> tuple[float, float]:
    """A range that shows the bulk of a curve: the first steep steps may leave at the top."""
    low, high = float(values.min()), float(np.quantile(values, 0.97))
    margin = max(0.08 * (high - low), 0.02)
    return low - margin, high + 2 * margin


def _moe_places(columns: Columns) -> list[str]:
    """Prefixes such as moe/layer1/pass0/clean: the clean section of every layer and pass; at most 12, spread evenly."""
    found = [match[1] for name in columns if (match := re.fullmatch(r"(moe/layer\d+/pass\d+/clean)/max_vio", name))]
    found.sort(key=lambda place: [int(number) for number in re.findall(r"\d+", place)])
    if len(found) > 12:
        found = [found[round(i * (len(found) - 1) / 11)] for i in range(12)]
    return found


def _loads(columns: Columns, place: str) -> tuple[Values, Values]:
    names: Sequence[str] = [n for n in columns if re.fullmatch(re.escape(place) + r"/load\d+", n)]
    there = np.isfinite(columns[names[0]])
    return columns["step"][there], np.stack([columns[name][there] for name in names])


def _place_words(place: str, *, line: bool = False) -> str:
    layer, passing = re.findall(r"\d+", place)[:2]
    return f"layer {layer},{' ' if line else chr(10)}pass {passing}"
