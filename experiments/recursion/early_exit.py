"""Early exit by convergence against fixed depths: held-out loss, passes and time of the run `recursion-sampled`.

python experiments/recursion/early_exit.py [run or checkpoint]

Token after token at batch 1, as in decoding. Writes early_exit.csv and early_exit.png.
"""

import csv
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from elara import checkpoint
from elara.cli import guard
from elara.data.preparation import open_prepared
from elara.model import ElaraLM, KVCache
from elara.report.style import BLUE, GREEN, ORANGE, STYLE
from elara.runs import find_checkpoint, project_root

HERE = Path(__file__).parent
DEPTHS, LIMITS, THRESHOLDS, WINDOWS = (1, 2, 3, 4), (2, 3, 4), (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0), 60


@dataclass
class Way:
    """A fixed depth, or a threshold below a deepest one. nats, passes and seconds per token of each window."""

    depth: int
    threshold: float | None
    nats: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def read(model: ElaraLM, window: Tensor, way: Way, calls: list[int]) -> None:
    """Loss of all tokens of a window but the first, each read by a forward of its own; calls: of the attention."""
    cache = KVCache(model.config, 1, len(window), depth=way.depth)
    calls[0] = 0
    started = time.perf_counter()
    hidden = [model(token.view(1, 1), cache=cache, exit_threshold=way.threshold).hidden[0] for token in window[:-1]]
    way.seconds.append((time.perf_counter() - started) / len(hidden))
    way.passes.append(calls[0] / len(model.blocks) / len(hidden))
    log_probs = model.ar_head(torch.cat(hidden)).log_softmax(-1)
    way.nats.append(-float(log_probs.gather(1, window[1:, None]).mean()))


@torch.inference_mode()
def measure(model: ElaraLM) -> list[Way]:
    """All ways in turn on each window, so that a busy machine is as busy for all."""
    prepared = (project_root() / "data" / "prepared").glob("shakespeare_char-*")
    folder = max(prepared, key=lambda path: path.stat().st_mtime)
    tokens = torch.from_numpy(open_prepared(folder).val.tokens.astype("int64"))
    seq = model.config.model.context_length
    starts = torch.linspace(0, len(tokens) - seq - 2, WINDOWS).long()
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    for block in model.blocks:
        block.attention.register_forward_hook(count)
    ways = [Way(depth, None) for depth in DEPTHS] + [Way(limit, t) for limit in LIMITS for t in THRESHOLDS]
    for start in starts.tolist():
        for way in ways:
            read(model, tokens[start : start + seq + 1], way, calls)
    return ways


def main() -> None:
    model = checkpoint.load(find_checkpoint(sys.argv[1] if len(sys.argv) > 1 else "recursion-sampled")).model
    ways = measure(model)
    one = next(way.seconds for way in ways if way.depth == 1)
    rows = []
    print("| depth | exit_threshold | passes | loss | time / depth 1 |\n|---|---|---|---|---|")
    for way in ways:
        cost = statistics.median(a / b for a, b in zip(way.seconds, one, strict=True))
        passes, loss = statistics.mean(way.passes), statistics.mean(way.nats)
        rows.append((way.depth, way.threshold, round(passes, 3), round(loss, 4), round(cost, 3)))
        threshold = "-" if way.threshold is None else f"{way.threshold:g}"
        print(f"| {way.depth} | {threshold} | {passes:.2f} | {loss:.3f} | {cost:.2f} |")
    print(f"a token at depth 1: {1e3 * statistics.median(one):.2f} ms")
    with open(HERE / "early_exit.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("depth", "exit_threshold", "passes", "loss", "time"))
        writer.writerows(rows)
    draw(rows)


def draw(rows: list[tuple[int, float | None, float, float, float]]) -> None:
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
        labels = ("mean passes of a block", "time of a token / depth 1")
        for axes, column, label in zip(panels, (2, 4), labels, strict=True):
            fixed = [row for row in rows if row[1] is None]
            axes.plot([r[column] for r in fixed], [r[3] for r in fixed], "ko-", label="fixed depth 1-4", zorder=3)
            for limit, colour in zip(LIMITS, (ORANGE, BLUE, GREEN), strict=True):
                own = [row for row in rows if row[0] == limit and row[1] is not None]
                label_own = f"exit, at most {limit}"
                axes.plot([r[column] for r in own], [r[3] for r in own], ".--", color=colour, label=label_own)
            axes.set(xlabel=label)
        panels[0].set(ylabel="held-out loss (nats/char)", title="Early exit by convergence")
        panels[0].legend()
        figure.savefig(HERE / "early_exit.png")


if __name__ == "__main__":
    guard(main)
