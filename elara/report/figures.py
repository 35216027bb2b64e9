"""Pictures of a run, drawn from its metrics.csv."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from elara.errors import ElaraError

matplotlib.use("Agg")

Columns = dict[str, NDArray[np.float64]]

BLUE, ORANGE, GREEN, GREY = "#2f6fb0", "#d9722b", "#3a8f5c", "#8a8f98"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.xmargin": 0.01,
    "figure.dpi": 110,
    "savefig.dpi": 150,
}


def read_metrics(path: Path) -> Columns:
    """metrics.csv by column, nan where a row has no value. Raises ElaraError when there is no row."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ElaraError(f"no metrics at {path}: {error.strerror}") from error
    if not rows:
        raise ElaraError(f"no metrics in {path} yet")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def draw_all(metrics: Path, folder: Path, title: str) -> list[Path]:
    """Draw every picture that `metrics` has figures for into `folder`; returns the files."""
    columns = read_metrics(metrics)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Columns, str], Figure | None]] = {
        "loss": loss_curves,
        "training": training_curves,
        "experts": expert_load,
        "acceptance": draft_acceptance,
    }
    drawn = []
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, draw in pictures.items():
            figure = draw(columns, title)
            if figure is not None:
                figure.savefig(folder / f"{name}.png", bbox_inches="tight")
                drawn.append(folder / f"{name}.png")
    return drawn


def loss_curves(columns: Columns, title: str) -> Figure | None:
    """Training and held-out loss of both heads over the steps."""
    heads = [name for name in ("ar", "diffusion") if f"train/loss_{name}" in columns]
    if not heads:
        return None
    figure = Figure(figsize=(5.2 * len(heads) + 1, 4), layout="constrained")
    words = {"ar": "Next token (autoregressive head)", "diffusion": "Draft (diffusion head)"}
    for axes, head in zip(np.atleast_1d(figure.subplots(1, len(heads))), heads, strict=True):
        steps, values = _points(columns, f"train/loss_{head}")
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=BLUE, linewidth=1.6, label="training, smoothed")
        held_steps, held = _points(columns, f"val/loss_{head}")
        if len(held):
            axes.plot(held_steps, held, "o-", color=ORANGE, markersize=4, linewidth=1.4, label="held-out text")
            best = int(np.argmin(held))
            axes.annotate(f"{held[best]:.3f}", (held_steps[best], held[best]), textcoords="offset points",
                          xytext=(0, 9), ha="right", color=ORANGE, fontweight="bold")  # fmt: skip
        axes.set_ylim(*_limits(np.concatenate([_smooth(values), held])))
        axes.set(title=words[head], xlabel="optimizer steps", ylabel="cross entropy (nats per token)")
        axes.legend()
    figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=9)
    return figure


def training_curves(columns: Columns, title: str) -> Figure | None:
    """Learning rate, gradient norm, speed."""
    panels = [
        ("train/lr", "Learning rate", "rate of the first group"),
        ("train/grad_norm", "Gradient norm", "L2 norm before clipping"),
        ("train/tokens_per_second", "Speed", "tokens per second"),
    ]
    panels = [panel for panel in panels if panel[0] in columns]
    if not panels:
        return None
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (name, heading, label) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        steps, values = _points(columns, name)
        axes.plot(steps, values, color=GREEN, linewidth=1.4)
        axes.set(title=heading, xlabel="optimizer steps", ylabel=label)
        axes.set_ylim(0, float(np.quantile(values, 0.99)) * 1.15 or 1.0)
    figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=9)
    return figure


def expert_load(columns: Columns, title: str) -> Figure | None:
    """Load of every expert over time as a heat map, and MaxVio of every layer."""
    places = _moe_places(columns)
    if not places:
        return None
    figure = Figure(figsize=(9, 1.6 + 0.85 * len(places) + 2.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[0.85 * len(places) + 0.8, 2.6])  # type: ignore[misc]
    rows = np.atleast_1d(upper.subplots(len(places), 1, sharex=True))
    image = None
    for axes, place in zip(rows, places, strict=True):
        steps, loads = _loads(columns, place)
        experts = len(loads)
        edges = np.concatenate([[steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)], steps])
        image = axes.pcolormesh(edges, np.arange(experts + 1) - 0.5, loads * experts, cmap="RdBu_r",
                                norm=TwoSlopeNorm(1.0, 0.0, 2.0), rasterized=True)  # fmt: skip
        axes.set_ylabel(_place_words(place), rotation=0, ha="right", va="center", fontsize=9)
        axes.set_yticks([0, experts - 1])
        axes.grid(False)
    rows[0].set_title("Load of each expert (1 = fair share)")
    upper.colorbar(image, ax=list(rows), label="load / fair share", shrink=0.8, extend="max")
    axes = lower.subplots()
    for i, place in enumerate(places):
        steps, values = _points(columns, f"{place}/max_vio")
        axes.plot(steps, _smooth(values), linewidth=1.4, label=_place_words(place, line=True), color=f"C{i}")
    axes.set(title="MaxVio: excess of the fullest expert", xlabel="optimizer steps", ylabel="max load / mean load - 1")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, ncols=2)
    figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=9)
    return figure


def draft_acceptance(columns: Columns, title: str) -> Figure | None:
    """How many drafted tokens stood, by position, at the end and over time."""
    names = sorted((n for n in columns if re.fullmatch(r"val/accept/\d+", n)), key=lambda n: int(n.rpartition("/")[2]))
    if not names:
        return None
    series = {int(name.rpartition("/")[2]): _points(columns, name) for name in names}
    positions = [1, *series]
    final = [1.0, *(float(values[-1]) for _, values in series.values())]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    shown = bars.bar(positions, final, color=[GREY] + [BLUE] * len(series), width=0.7)
    bars.bar_label(shown, [f"{share:.0%}" for share in final], padding=2)
    bars.set(title="Accepted up to position", xlabel="position in the draft (the first comes from the AR head)",
             ylabel="share of drafts", ylim=(0, 1.1), xticks=positions)  # fmt: skip
    steps, values = _points(columns, "val/tokens_per_forward")
    lines.plot(steps, values, "o-", color=ORANGE, markersize=4)
    lines.set(title="Tokens per forward pass", xlabel="optimizer steps", ylabel="tokens (autoregressive: 1)")
    lines.set_ylim(bottom=min(1.0, float(values.min())) - 0.05)
    figure.suptitle(title, x=0.01, ha="left", color=GREY, fontsize=9)
    return figure


def _points(columns: Columns, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the rows that have one."""
    if name not in columns:
        return np.empty(0), np.empty(0)
    there = np.isfinite(columns[name])
    return columns["step"][there], columns[name][there]


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential mean over about a fortieth of the points, without the start's bias."""
    keep = 1 - 1 / max(1.0, len(values) / 40)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return np.array(out)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
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


def _loads(columns: Columns, place: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    names: Sequence[str] = [n for n in columns if re.fullmatch(re.escape(place) + r"/load\d+", n)]
    there = np.isfinite(columns[names[0]])
    return columns["step"][there], np.stack([columns[name][there] for name in names])


def _place_words(place: str, *, line: bool = False) -> str:
    layer, passing = re.findall(r"\d+", place)[:2]
    return f"layer {layer},{' ' if line else chr(10)}pass {passing}"
