"""How every picture of this project looks."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

BLUE, ORANGE, GREEN, GREY, DARK = "#2f6fb0", "#d9722b", "#3a8f5c", "#8a8f98", "#444444"
PALETTE = (BLUE, ORANGE, GREEN, "#8456a8", "#b83b5e", "#4d9fa6")
STYLE: dict[str, Any] = {
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
