"""Draw scaling.png from runs.csv: loss against the rate, the best rate against the width, what large batches cost."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator

from elara.cli import guard
from elara.report.style import BLUE, GREEN, ORANGE, PALETTE, STYLE

HERE = Path(__file__).parent
CONFIG = {"elara_124m": 0.02, "elara_2p8b": 0.02}  # optimizer.lr of conf/experiment


def load_fit() -> Any:
    """fit.py beside this file: the folder's name is none that Python imports from."""
    spec = importlib.util.spec_from_file_location("fit", HERE / "fit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    fit = load_fit()
    cells, _ = fit.read()
    found, _ = fit.optima(cells, np.random.default_rng(0))
    rule = fit.fit_rule(found, np.random.default_rng(1))
    tokens, batch = fit.BASE.tokens, fit.BASE.batch
    by_width = [cell for cell in found if (cell.layers, cell.tokens, cell.batch) == (2, tokens, batch)]
    with plt.rc_context(STYLE):
        figure, (rates, widths, batches) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
        for cell, colour in zip(by_width, PALETTE, strict=False):
            first = cells[cell].seed == 1
            lr = 0.02 * 2 ** (cells[cell].notch / 2)
            rates.plot(lr[first], cells[cell].loss[first], "o-", color=colour, label=f"width {cell.width}")
            rates.plot(lr[~first], cells[cell].loss[~first], "x", color=colour)
            rates.plot(2 ** found[cell].rate, found[cell].loss, "*", color=colour, markersize=14)
        rates.set(xscale="log", title="Loss against the learning rate", xlabel="lr of Muon (adam_lr is a fifth)",
                  ylabel="held-out nats per character")  # fmt: skip
        rates.xaxis.set_major_locator(FixedLocator([0.005, 0.01, 0.02, 0.04, 0.08]))
        rates.xaxis.set_major_formatter("{x:g}")
        rates.xaxis.set_minor_locator(NullLocator())
        rates.legend(fontsize=8, loc="upper right", ncols=2)
        x = np.geomspace(24, 1600, 60)
        best, low, high = np.array([rule.rate(fit.Cell(w, 2, tokens, batch)) for w in x]).T
        widths.plot(x, best, color=BLUE, label="2 blocks, batches of 1 k tokens")
        widths.fill_between(x, low, high, color=BLUE, alpha=0.15)
        optima = [2 ** found[cell].rate for cell in by_width]
        errors = [[2 ** o.rate - 2 ** np.percentile(o.rates, 16), 2 ** np.percentile(o.rates, 84) - 2 ** o.rate]
                  for o in (found[cell] for cell in by_width)]  # fmt: skip
        widths.errorbar([c.width for c in by_width], optima, np.abs(np.array(errors)).T, fmt="o", color=BLUE, capsize=3)
        for name, target in fit.TARGETS.items():
            best, low, high = rule.rate(target)
            spread = [[best - low], [high - best]]
            words = "the two large sizes, extrapolated" if name == "elara_124m" else None
            widths.errorbar(target.width, best, spread, fmt="o", color=ORANGE, capsize=4, label=words)
            widths.plot(target.width, CONFIG[name], "s", color=GREEN, label=words and "their configurations")
            short = name.removeprefix("elara_").replace("2p8b", "2.8 B").replace("124m", "124 M")
            widths.annotate(short, (target.width, high), textcoords="offset points", xytext=(0, 6), ha="center")
        widths.set(xscale="log", yscale="log", title="Best rate against the width", xlabel="n_embd", ylabel="lr")
        widths.set_xlim(24, 1900)
        widths.yaxis.set_major_locator(FixedLocator([0.005, 0.01, 0.02, 0.04]))
        widths.yaxis.set_major_formatter("{x:g}")
        widths.yaxis.set_minor_locator(NullLocator())
        widths.legend(loc="lower left", fontsize=9)
        k, q, levels, _ = fit.steps_term(found)
        for (width, total), colour in zip(levels, PALETTE, strict=False):
            group = [cell for cell in found if (cell.width, cell.layers, cell.tokens) == (width, 2, total)]
            steps = np.array([cell.tokens / cell.batch for cell in group])
            batches.plot(
                steps, [found[c].loss for c in group], "o", color=colour, label=f"width {width}, {total / 1e6:.1f} M"
            )
            line = np.geomspace(min(steps), max(steps) * 2, 40)
            batches.plot(line, levels[width, total] + k * line**-q, color=colour, linewidth=1)
        batches.set(xscale="log", title="What large batches cost: steps", xlabel="optimizer steps",
                    ylabel="held-out loss at the best rate")  # fmt: skip
        batches.legend(title="tokens in all")
        figure.savefig(HERE / "scaling.png")


if __name__ == "__main__":
    guard(main)
