"""Draw MaxVio of the runs `balance-bias` and `balance-none`, and print their table."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from elara.cli import guard
from elara.report.metrics import read_metrics
from elara.report.style import STYLE
from elara.runs import find_runs

HERE = Path(__file__).parent


def main() -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
        print("| run | held-out loss (nats/char) | MaxVio pass 1 | MaxVio pass 2 | dead experts |")
        print("|---|---|---|---|---|")
        for name, colour, label in (
            ("balance-bias", "#2f6fb0", "bias_update_rate 0.01"),
            ("balance-none", "#d9722b", "no balancing"),
        ):
            columns = read_metrics(find_runs(name)[0].metrics)
            step = columns["step"]
            late = step > 0.8 * np.nanmax(step)
            row = [f"{np.nanmin(columns['val/loss_ar']):.3f}"]
            for recursion, style in ((0, "-"), (1, "--")):
                prefix = f"moe/layer1/pass{recursion}/clean"
                values = columns[f"{prefix}/max_vio"]
                shown = ~np.isnan(values)
                axes.plot(step[shown], values[shown], style, color=colour, label=f"{label}, pass {recursion + 1}")
                row.append(f"{np.nanmean(values[late]):.2f}")
            dead = [np.nanmean(columns[f"moe/layer1/pass{r}/clean/dead"][late]) for r in (0, 1)]
            print(f"| {label} | {' | '.join(row)} | {max(dead):.1f} |")
        axes.axhline(0.3, color="#8a8f98", linewidth=1)
        axes.set(xlabel="optimizer steps", ylabel="max load / mean load - 1", title="Imbalance of the experts (MaxVio)")
        axes.set_ylim(0)
        axes.legend()
        figure.savefig(HERE / "balance.png", dpi=150)


if __name__ == "__main__":
    guard(main)
