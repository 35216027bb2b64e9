"""Where the time of a whole training step goes, by part: shares before and after, as JSON and as a picture.

    OMP_NUM_THREADS=1 python experiments/training-speed/shares.py measure after.json
    python experiments/training-speed/shares.py draw before.json after.json shares.png
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from elara.device import device_name
from elara.training import profiling

STEPS = 10
COLORS = (
    "#2f6fb0", "#7db0dd", "#d9722b", "#eeb17f", "#8a5fa8", "#3a8f5c", "#c9c04a", "#555b66", "#b0b5bd", "#e0e2e6",
)  # fmt: skip


def measure(file: Path) -> None:
    """Shares from a profile of `STEPS` steps, CPU seconds of a step from as many without a profiler."""
    from steps import MODELS, training_step

    found = []
    for name in list(MODELS)[:2]:
        for narrow in (True, False):
            model, step = training_step(name, narrow)
            for _ in range(3):
                step()
            seconds = []
            for _ in range(STEPS):
                begin = time.process_time()
                step()
                seconds.append(time.process_time() - begin)
            with profiling.attach(model), profile(activities=[ProfilerActivity.CPU]) as events:
                begin = time.perf_counter()
                for _ in range(STEPS):
                    step()
                window = time.perf_counter() - begin
            plain = statistics.median(seconds)
            whole = profiling.measured(events.events(), STEPS, 1, window, plain, device_name())
            precision = "bf16" if narrow else "fp32"
            found.append({"model": name, "precision": precision, "seconds": plain, "shares": whole.shares()})
            print(name, precision, f"{1e3 * plain:.0f} ms", whole.shares(), flush=True)
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def draw(before: Path, after: Path, picture: Path) -> None:
    """A pair of bars for every model and precision, in CPU milliseconds of a step."""
    from matplotlib.figure import Figure

    old, new = (json.loads(file.read_text("utf-8")) for file in (before, after))
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=130)
    for axes, one, other in zip(figure.subplots(len(old), 1), old, new, strict=True):
        _pair(axes, one, other)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(picture)


def _pair(axes: Any, one: dict[str, Any], other: dict[str, Any]) -> None:
    left = [0.0, 0.0]
    rows = ["before", "after"]
    for part, color in zip(profiling.PARTS, COLORS, strict=True):
        widths = [1e3 * run["seconds"] * run["shares"].get(part, 0.0) for run in (one, other)]
        axes.barh(rows, widths, left=left, color=color, label=part, height=0.7)
        for row, (width, begin) in enumerate(zip(widths, left, strict=True)):
            if width > 0.045 * 1e3 * one["seconds"]:
                axes.text(begin + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, end in enumerate(left):
        axes.text(end, row, f"  {end:.0f} ms", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    axes.set_title(f"{one['model']}, {one['precision']}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure(Path(sys.argv[2]))
    else:
        draw(*map(Path, sys.argv[2:5]))
