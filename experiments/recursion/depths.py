"""Held-out loss of the runs `recursion-sampled` and `recursion-fixed` at depths 1-4: a table and a plot."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from elara import checkpoint
from elara.cli import guard
from elara.data.preparation import open_prepared
from elara.report.style import STYLE
from elara.runs import find_checkpoint, project_root
from elara.training.losses import cross_entropy

HERE = Path(__file__).parent
DEPTHS, WINDOWS = (1, 2, 3, 4), 400


@torch.no_grad()
def losses(run: str) -> list[float]:
    """AR loss in nats per character at each depth, over windows spread evenly over the held-out plays."""
    loaded = checkpoint.load(find_checkpoint(run))
    prepared = (project_root() / "data" / "prepared").glob("shakespeare_char-*")
    folder = max(prepared, key=lambda path: path.stat().st_mtime)
    tokens = torch.from_numpy(open_prepared(folder).val.tokens.astype("int64"))
    seq = loaded.config.model.context_length
    starts = torch.linspace(0, len(tokens) - seq - 2, WINDOWS).long()
    windows = tokens[starts[:, None] + torch.arange(seq + 1)]
    found = []
    for depth in DEPTHS:
        total = 0.0
        for batch in windows.split(20):
            hidden = loaded.model(batch[:, :-1], depth=depth).hidden.flatten(0, 1)
            total += len(batch) * float(cross_entropy(hidden, loaded.model.embed.weight, batch[:, 1:].flatten()))
        found.append(total / WINDOWS)
    return found


def main() -> None:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        print("| trained at | " + " | ".join(f"depth {d}" for d in DEPTHS) + " |\n|---" + "|---" * len(DEPTHS) + "|")
        for run, label, colour in (
            ("recursion-sampled", "depth 1-4, sampled", "#2f6fb0"),
            ("recursion-fixed", "depth 2, fixed", "#d9722b"),
        ):
            values = losses(run)
            print(f"| {label} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
            axes.plot(DEPTHS, values, "o-", color=colour, label=f"trained at {label}")
        axes.set(xticks=DEPTHS, xlabel="recursion depth at inference", ylabel="held-out loss (nats/char)")
        axes.set_title("Thinking shorter and longer than trained")
        axes.legend()
        figure.savefig(HERE / "depths.png", dpi=150)


if __name__ == "__main__":
    guard(main)
