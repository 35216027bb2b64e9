"""A student from scratch with and without a teacher: loss by step and by time, from the runs' own figures.

    python experiments/distillation/compare.py collect text=<run> smollm2=<run>  # writes steps.csv
    python experiments/distillation/compare.py  # distillation.png and the table from steps.csv
"""

import csv
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from elara.report.metrics import points, read_metrics, smooth
from elara.report.style import PALETTE, STYLE

HERE = Path(__file__).parent
STEPS = HERE / "steps.csv"
FIGURES = ("train/loss_ar", "train/loss_diffusion", "val/loss_ar", "val/loss_diffusion", "train/seconds_per_step")


def collect(named: list[str]) -> None:
    """Keep what the study needs of each run's metrics.csv."""
    with STEPS.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "figure", "step", "value"])
        for name, folder in (given.split("=", 1) for given in named):
            columns = read_metrics(Path(folder) / "metrics.csv")
            for figure in FIGURES:
                for step, value in zip(*points(columns, figure), strict=True):
                    rows.writerow([name, figure, f"{step:.0f}", f"{value:.4f}"])


def show() -> None:
    """Print the table and draw the picture."""
    runs: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with STEPS.open() as file:
        for row in csv.DictReader(file):
            found = runs.setdefault(row["run"], {}).setdefault(row["figure"], [])
            found.append((float(row["step"]), float(row["value"])))
    curves = {name: {figure: np.array(rows).T for figure, rows in figures.items()} for name, figures in runs.items()}
    print("| run | held-out AR | held-out diffusion | s per step |\n|---|---|---|---|")
    for name, curve in curves.items():
        pace = np.median(curve["train/seconds_per_step"][1])
        print(f"| {name} | {curve['val/loss_ar'][1][-1]:.3f} | {curve['val/loss_diffusion'][1][-1]:.3f} | {pace:.2f} |")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, (head, title) in zip(
            figure.subplots(1, 2), (("ar", "Next token"), ("diffusion", "Draft")), strict=True
        ):
            for colour, (name, curve) in zip(PALETTE, curves.items(), strict=False):
                steps, values = curve[f"train/loss_{head}"]
                axes.plot(steps, smooth(values), color=colour, linewidth=1.4, label=f"{name}: text read once")
                axes.plot(*curve[f"val/loss_{head}"], "o", color=colour, markersize=5, label=f"{name}: held-out plays")
            axes.set(title=title, xlabel="optimizer steps", ylabel="cross entropy (nats per token)", ylim=(4.5, 7))
        axes.legend()
        figure.savefig(HERE / "distillation.png", bbox_inches="tight")


if __name__ == "__main__":
    collect(sys.argv[2:]) if sys.argv[1:2] == ["collect"] else show()
