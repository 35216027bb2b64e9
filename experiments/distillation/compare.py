"""Students from scratch with and without teachers: loss by step and at the end, from the runs' own figures.

    python experiments/distillation/compare.py collect  # steps.csv from the runs under outputs/train
    python experiments/distillation/compare.py  # distillation.png and the table from steps.csv
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from elara.report.metrics import points, read_metrics
from elara.report.style import PALETTE, STYLE
from elara.runs import project_root

HERE = Path(__file__).parent
STEPS = HERE / "steps.csv"
FIGURES = ("val/loss_ar", "val/loss_diffusion")
ARMS = {  # runs by their name: what they are called here
    "d_text": "text alone",
    "d_text_long": "text alone, 405 steps",
    "d_texts": "+ SmolLM2's words",
    "d_logits_short": "+ SmolLM2's logits, 154 steps",
    "d_logits": "+ SmolLM2's logits",
    "d_both": "+ words and logits",
    "d_elara": "+ an older Elara's logits",
    "d_two": "+ both teachers, half each",
    "d_two_best": "+ both, who knows a window best",
    "d_policy": "+ SmolLM2, a quarter on-policy",
    "d_weight_25": "+ SmolLM2, weight 0.25",
    "d_logits_w1": "SmolLM2's logits alone",
    "d_logits_ar": "+ SmolLM2, next-token head alone",
    "d_reverse": "+ SmolLM2, reverse KL",
    "d_js": "+ SmolLM2, Jensen-Shannon",
}
DRAWN = ("d_text", "d_text_long", "d_texts", "d_logits_short", "d_logits", "d_two")


def collect() -> None:
    """Keep what the study needs of each finished run's metrics.csv."""
    with STEPS.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "seed", "figure", "step", "value"])
        for name in ARMS:
            for folder in sorted((project_root() / "outputs" / "train" / name).glob("*")):
                columns, config = read_metrics(folder / "metrics.csv"), OmegaConf.load(folder / "config.yaml")
                for figure in FIGURES:
                    steps, values = points(columns, figure)
                    if len(steps) and steps[-1] == config.trainer.max_steps:
                        for step, value in zip(steps, values, strict=True):
                            rows.writerow([name, config.seed, figure, f"{step:.0f}", f"{value:.4f}"])


def show() -> None:
    """Print the table and draw the picture."""
    runs: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    with STEPS.open() as file:
        for row in csv.DictReader(file):
            runs[row["run"]][row["figure"]][row["seed"]].append((float(row["step"]), float(row["value"])))
    last = {
        name: {figure: [curve[-1][1] for curve in seeds.values()] for figure, seeds in figures.items()}
        for name, figures in runs.items()
    }
    print("| student | seeds | steps | held-out AR | against the text | held-out draft |\n|---|---|---|---|---|---|")
    text = np.mean(last["d_text"]["val/loss_ar"])
    for name in filter(runs.__contains__, ARMS):
        ar, drafts = (np.array(last[name][figure]) for figure in FIGURES)
        steps = next(iter(runs[name]["val/loss_ar"].values()))[-1][0]
        spread = f" ± {np.ptp(ar) / 2:.3f}" if len(ar) > 1 else ""
        against = f"{ar.mean() - text:+.3f}"
        print(f"| {ARMS[name]} | {len(ar)} | {steps:.0f} | {ar.mean():.3f}{spread} | {against} | {drafts.mean():.3f} |")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.4), layout="constrained")
        curves, ends = figure.subplots(1, 2, width_ratios=(1.1, 1))
        colours = dict(zip(DRAWN, PALETTE, strict=False))
        for name in filter(runs.__contains__, DRAWN):
            every = np.array(list(runs[name]["val/loss_ar"].values()))  # (seeds, validations, 2)
            steps, mean = every[0, :, 0], every[..., 1].mean(0)
            curves.plot(steps, mean, "o-", markersize=3.5, color=colours[name], label=ARMS[name])
        curves.axhline(text, color="0.6", linewidth=0.8, linestyle="--")
        curves.set(xlabel="optimizer steps of 1,024 tokens", ylabel="held-out next token (nats)", ylim=(4.85, 6.0))
        curves.set_title("Mean over the seeds")
        curves.legend(fontsize=8)
        names = [name for name in ARMS if name in runs][::-1]
        for place, name in enumerate(names):
            values = last[name]["val/loss_ar"]
            ends.plot(values, [place] * len(values), "o", color=colours.get(name, "0.35"), markersize=5)
        ends.axvline(text, color="0.6", linewidth=0.8, linestyle="--")
        ends.set_yticks(range(len(names)), [ARMS[name] for name in names], fontsize=8)
        ends.set(xlabel="held-out next token at the end (nats)", title="Every run")
        figure.savefig(HERE / "distillation.png", bbox_inches="tight")


if __name__ == "__main__":
    collect() if sys.argv[1:] == ["collect"] else show()
