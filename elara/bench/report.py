"""Figures as a table, a JSON file and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Picture
from rich.table import Table

from elara.bench.measure import Figure
from elara.device import device_name

GREEN, ORANGE, BLUE = "#3a8f5c", "#d9722b", "#4a78b5"
LINES = ("#4a78b5", "#d9722b", "#3a8f5c", "#8a5fa8", "#a8893a", "#444444", "#c25b7c", "#5fa8a3", "#999999")


def table(figures: list[Figure], device: torch.device) -> Table:
    """All figures; `of limit` is the subject's share of what the machine was measured to be able to."""
    found = Table(title=f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for column in ("", "ratio", "quartiles", "target", "subject", "reference", "of limit", "tokens/s", "of"):
        found.add_column(column, justify="left" if column in ("", "of") else "right")
    for f in figures:
        target = "" if f.target is None else f"{'>=' if f.faster else '<='} {f.target:g}"
        if f.share_target is not None:
            target = f"{target} limit >= {f.share_target:.0%}".strip()
        share = "" if f.share is None else f"{f.share:.0%} of {f.limit}"
        speed = "" if f.tokens_per_second is None else f"{f.tokens_per_second:,.0f}"
        found.add_row(
            f.name,
            f"{f.ratio:.2f}",
            f"{f.low:.2f}-{f.high:.2f}" if f.low != f.high else "",
            target + ("" if f.met else " missed"),
            _amount(f.subject, f.unit),
            _amount(f.reference, f.unit),
            share + ("" if f.mfu is None else f", MFU {f.mfu:.0%}"),
            speed,
            f.note,
        )
    return found


def write(figures: list[Figure], limits: dict[str, float], device: torch.device, folder: Path) -> None:
    """bench.json and bench.png. limits: what the machine was measured to be able to, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"hardware": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    result = {**about, "limits": limits, "figures": [{**asdict(f), "met": f.met} for f in figures]}
    (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _draw(figures, device).savefig(folder / "bench.png", dpi=130)


def _amount(value: float, unit: str) -> str:
    return f"{value / 1e6:.0f} MB" if unit == "bytes" else f"{1e3 * value:.1f} ms"


def _draw(figures: list[Figure], device: torch.device) -> Picture:
    """A panel each for figures with a target, shares of limits, other ratios, and both kinds of curves, where given."""
    targets = [f for f in figures if f.target is not None]
    shares = [f for f in figures if f.share is not None]
    costs = [f for f in figures if f.series and not f.faster]
    speeds = [f for f in figures if f.series and f.faster]
    plain = [f for f in figures if f.target is None and f.share is None and not f.series]
    panels: list[tuple[Any, list[Figure], float]] = [
        (panel, part, 0.32 * rows + 0.9)
        for panel, part, rows in (
            (_targets, targets, len(targets)),
            (_shares, shares, len(shares)),
            (_plain, plain, len(plain)),
            (_costs, costs, 10),
            (_speeds, speeds, 10),
        )
        if part
    ]
    heights = [height for _, _, height in panels]
    picture = Picture(figsize=(10, sum(heights) + 0.6), layout="constrained")
    axes = picture.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (panel, part, _), place in zip(panels, axes, strict=True):
        panel(place, part)
    picture.suptitle(f"Speed on {device_name(device)}, {torch.get_num_threads()} threads", x=0.02, ha="left")
    return picture


def _targets(axes: Any, figures: list[Figure]) -> None:
    costs = [(f.target or 0) / f.ratio if f.faster else f.ratio / (f.target or 1) for f in figures]
    labels = [f"{f.ratio:.2f} ({'at least' if f.faster else 'at most'} {f.target:g})" for f in figures]
    _bars(axes, figures, costs, labels, [GREEN if cost <= 1 else ORANGE for cost in costs])
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_xlabel("cost relative to the target (left of the line: met)")


def _shares(axes: Any, figures: list[Figure]) -> None:
    shares = [f.share or 0.0 for f in figures]
    labels = [f"{share:.0%} of {f.limit}" for f, share in zip(figures, shares, strict=True)]
    _bars(axes, figures, shares, labels, [BLUE] * len(figures))
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_xlabel("share of the machine's measured limit")


def _plain(axes: Any, figures: list[Figure]) -> None:
    _bars(axes, figures, [f.ratio for f in figures], [f"{f.ratio:.2f}" for f in figures], [BLUE] * len(figures))
    axes.set_xlabel("ratio")


def _bars(axes: Any, figures: list[Figure], values: list[float], labels: list[str], colors: list[str]) -> None:
    places = range(len(figures) - 1, -1, -1)
    axes.barh(places, values, color=colors, height=0.6)
    for place, value, label in zip(places, values, labels, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # above the line at 1
        axes.text(value + 0.01, place, label, va="center", fontsize=8, bbox=box)
    axes.set_yticks(places, [f.name for f in figures], fontsize=8)
    axes.set_xlim(0, 1.35 * max([1.0, *values]))


def _costs(axes: Any, figures: list[Figure]) -> None:
    _curves(axes, figures)
    axes.set_xlabel("new tokens of one forward")
    axes.set_ylabel("cost / one token's")


def _speeds(axes: Any, figures: list[Figure]) -> None:
    _curves(axes, figures)
    axes.set_xlabel("draft length")
    axes.set_ylabel("tokens/s over plain AR's")


def _curves(axes: Any, figures: list[Figure]) -> None:
    for number, series in enumerate(dict.fromkeys(f.series for f in figures)):
        points = [(f.at or 0, f.ratio) for f in figures if f.series == series]
        axes.plot(*zip(*points, strict=True), marker="o", color=LINES[number % len(LINES)], label=series)
    axes.axhline(1, color="#444444", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sorted({f.at or 0 for f in figures}))
    axes.minorticks_off()
    axes.legend(fontsize=8, ncols=2)
