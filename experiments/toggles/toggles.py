"""Table and picture of the toggles study: python experiments/toggles/toggles.py outputs/sweeps/toggles/<time>

The runs give losses and drafts; step times are measured here, all eight in turn, because neighbours on a shared machine
can be compared and runs an hour apart cannot. `runs.csv` keeps what the sweep gave, `steps.csv` what was measured.
"""

from __future__ import annotations

import csv
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from elara.bench.measure import race
from elara.cli import guard, register_resolvers
from elara.config import ElaraConfig
from elara.model import ElaraLM
from elara.report import summarize
from elara.report.style import BLUE, DARK, GREEN, GREY, ORANGE, STYLE
from elara.runs import CHECKOUT
from elara.size.report import size_report
from elara.training.config import register
from elara.training.losses import elara_loss

HERE = Path(__file__).parent
TOGGLES = {"moe": ("none", "deepseek"), "trm": ("none", "depth2"), "tidar": ("none", "chained")}
NAMES = {"moe": "experts", "trm": "recursion", "tidar": "TiDAR"}
VOCABULARY, ROUNDS = 128, 15

Combination = tuple[str, ...]


def label(combination: Combination) -> str:
    on = [NAMES[key] for key, value in zip(TOGGLES, combination, strict=True) if value != "none"]
    return " + ".join(on) or "plain"


def composed(combination: Combination) -> tuple[ElaraConfig, Any]:
    """The architecture of a combination and its optimizer's settings."""
    config = compose("train", [f"{key}={value}" for key, value in zip(TOGGLES, combination, strict=True)])
    groups: Any = {group: OmegaConf.to_container(config[group]) for group in ("model", *TOGGLES)}
    groups["model"]["vocab_size"] = VOCABULARY
    return ElaraConfig.from_dict(groups), config.optimizer


def step_of(combination: Combination) -> Callable[[], None]:
    """A whole optimizer step on 8 x 256 random tokens in bf16, as the quick run takes it."""
    config, settings = composed(combination)
    model = ElaraLM(config)
    optimizer = instantiate(settings)(model)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        tokens = torch.randint(VOCABULARY - 8, (8, config.model.context_length + 1))
        with torch.autocast("cpu", torch.bfloat16):
            loss = elara_loss(model, tokens, generator, mask_id=VOCABULARY - 8).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_steps(combinations: list[Combination]) -> dict[Combination, float]:
    """Step time of every combination relative to the plain one: the median of ratios of neighbours."""
    seconds = race({label(c): step_of(c) for c in combinations}, ROUNDS)
    plain = seconds[label(combinations[0])]
    ratios = {c: statistics.median(a / b for a, b in zip(seconds[label(c)], plain, strict=True)) for c in combinations}
    with open(HERE / "steps.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*TOGGLES, "step_time_over_plain"])
        writer.writerows([*c, f"{ratio:.3f}"] for c, ratio in ratios.items())
    return ratios


def saved_steps() -> dict[Combination, float]:
    with open(HERE / "steps.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[key] for key in TOGGLES): float(row["step_time_over_plain"]) for row in rows}


def read_runs(folder: Path | None) -> list[dict[str, str]]:
    """One row per finished run, from the sweep's own summary or from the copy kept here."""
    if folder is not None:
        summarize(folder)
        with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["state"] == "finished"]
        kept = [*TOGGLES, "seed", "val_loss_last", "tokens_per_forward", "parameters"]
        with open(HERE / "runs.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, kept, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with open(HERE / "runs.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    register_resolvers()
    register()
    runs = read_runs(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    combinations = list(itertools.product(*TOGGLES.values()))
    with initialize_config_dir(str(CHECKOUT / "conf"), version_base="1.3"):
        steps = saved_steps() if (HERE / "steps.csv").exists() else measure_steps(combinations)
        sizes = {c: size_report(composed(c)[0]) for c in combinations}
    losses = {
        c: [float(run["val_loss_last"]) for run in runs if tuple(run[key] for key in TOGGLES) == c]
        for c in combinations
    }
    head = [*NAMES.values(), "held-out loss", "spread", "step time", "tokens per forward", "parameters", "active"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for c in combinations:
        drafts = [float(run["tokens_per_forward"] or 1) for run in runs if tuple(run[key] for key in TOGGLES) == c]
        on = " | ".join("yes" if value != "none" else "" for value in c)
        size = sizes[c]
        print(
            f"| {on} | {statistics.fmean(losses[c]):.3f} | {statistics.stdev(losses[c]):.3f} | {steps[c]:.2f} | "
            f"{statistics.fmean(drafts):.2f} | {size['total'] / 1e6:.2f} M | {size['active'] / 1e6:.2f} M |"
        )
    draw(combinations, losses, steps)


def draw(
    combinations: list[Combination], losses: dict[Combination, list[float]], steps: dict[Combination, float]
) -> None:
    """Losses side by side, and against what a step costs."""
    order = sorted(combinations, key=lambda c: statistics.fmean(losses[c]), reverse=True)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
        for place, c in enumerate(order):
            mean, spread = statistics.fmean(losses[c]), statistics.stdev(losses[c])
            left.errorbar(mean, place, xerr=spread, fmt="o", color=colour(c), capsize=3)
            left.plot(losses[c], [place] * len(losses[c]), "|", color=GREY, markersize=9)
            left.annotate(f"{mean:.3f}", (mean, place), textcoords="offset points", xytext=(0, 8), ha="center",
                          fontsize=8, color=DARK)  # fmt: skip
            right.plot(steps[c], mean, "s" if c[2] != "none" else "o", color=colour(c), markersize=8)
            right.annotate(label(c), (steps[c], mean), textcoords="offset points", xytext=(8, 3), fontsize=8)
        left.set_yticks(range(len(order)), [label(c) for c in order])
        left.set_ylim(-0.6, len(order) - 0.2)
        left.set(title="Held-out loss after the same text", xlabel="nats per character (mean and deviation of 3 seeds)")
        right.set(title="What a step costs", xlabel="step time / plain decoder's", ylabel="nats per character")
        right.set_xlim(0.8, 4.0)  # room for the last name
        right.margins(y=0.12)
        figure.savefig(HERE / "toggles.png")


def colour(combination: Combination) -> str:
    experts, recursion = combination[0] != "none", combination[1] != "none"
    return {(False, False): GREY, (True, False): BLUE, (False, True): ORANGE, (True, True): GREEN}[experts, recursion]


if __name__ == "__main__":
    guard(main)
