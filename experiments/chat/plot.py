"""Draws calls.png: the loss of the runs by step, and right arguments by family.

    python experiments/chat/plot.py collect <run with a base> <run without>  # writes steps.csv
    python experiments/chat/plot.py  # calls.png from steps.csv and evaluation.json
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from elara.report.style import BLUE, GREY, ORANGE, STYLE

HERE = Path(__file__).parent
LABELS = ("behind the base", "from nothing")


def collect(folders: list[str]) -> None:
    """The training loss of each run, every tenth step."""
    with (HERE / "steps.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "step", "loss"])
        for label, folder in zip(LABELS, folders, strict=False):
            with (Path(folder) / "metrics.csv").open() as metrics:
                for row in csv.DictReader(metrics):
                    if row.get("train/loss_ar"):
                        rows.writerow([label, row["step"], f"{float(row['train/loss_ar']):.4f}"])


def draw() -> None:
    with (HERE / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    (result,) = json.loads((HERE / "evaluation.json").read_text())["results"]
    rates = {(one["family"], one["phrasing"]): one for one in result["tool_calls"]["rates"]}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for label, colour in zip(LABELS, (BLUE, GREY), strict=True):
            own = [(int(row["step"]), float(row["loss"])) for row in steps if row["run"] == label]
            if own:
                left.plot(*zip(*own, strict=True), color=colour, label=label, linewidth=1.2)
        left.set(title="Loss on the assistant's bytes", xlabel="step of 2,048 bytes", ylabel="nats", yscale="log")
        left.legend()
        families = [family for family, phrasing in rates if phrasing == "seen" and family not in ("all tools", "talk")]
        for i, (phrasing, colour) in enumerate((("seen", BLUE), ("held out", ORANGE))):
            for place, family in enumerate(families):
                one = rates[family, phrasing]["arguments"]
                at = place + (i - 0.5) * 0.38
                label = None if place else f"phrasings {phrasing}"
                right.barh(at, one["share"], height=0.36, color=colour, label=label)
                spread = [[one["share"] - one["low"]], [one["high"] - one["share"]]]
                right.errorbar(one["share"], at, xerr=spread, color="#444444")
                right.text(0.02, at, f"{one['share']:.1%}", va="center", color="white", fontsize=9)
        right.axvline(0.85, color=GREY, linestyle="--", linewidth=1)
        right.set_yticks(range(len(families)), families)
        right.invert_yaxis()
        right.grid(False, axis="y")
        right.set(title="Right arguments, unseen numbers, dates and names", xlabel="share; line = 95 % interval")
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        figure.savefig(HERE / "calls.png", bbox_inches="tight")


if __name__ == "__main__":
    collect(sys.argv[2:]) if sys.argv[1:2] == ["collect"] else draw()
