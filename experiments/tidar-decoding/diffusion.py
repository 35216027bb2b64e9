"""Lossy ways to write faster: block diffusion by steps, order and confidence, and TiDAR with trust.

python experiments/tidar-decoding/diffusion.py [run trained with random masks] [run trained with full masks]

Writes diffusion.csv and diffusion.png. Perplexity is that of the written text under the same model's AR head. A low one
is not good by itself: text that repeats itself is likely. So the share of distinct 4-grams stands beside it.
"""

import csv
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from elara import checkpoint
from elara.checkpoint import Loaded
from elara.cli import guard
from elara.data.preparation import open_prepared
from elara.decoding import SamplingConfig, generate, writable
from elara.evaluation.loss import ratio
from elara.report.style import BLUE, GREEN, GREY, ORANGE, STYLE
from elara.runs import find_checkpoint, project_root

HERE = Path(__file__).parent
PROMPTS, PROMPT, NEW = 96, 64, 128  # held-out places, tokens read and tokens written at each; the window never slides
MASKS = ("random", "full")  # of the two models
STEPS, CONFIDENCES, TRUSTS = (1, 2, 4, 8), (0.3, 0.1), (0.0, 0.3, 0.6, 0.9, 1.0)


@dataclass(frozen=True)
class Way:
    """masks: what the model saw in training, random or full. mode: None is the held-out text itself."""

    masks: str
    mode: str | None
    temperature: float
    choices: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        choices = ", ".join(f"{key} {value}" for key, value in self.choices.items())
        return f"{self.mode}, {choices}" if choices else self.mode or "held-out text"


@dataclass
class Figures:
    """perplexity: of the text under the AR head; log_error: standard error of its logarithm over prompts. distinct:
    share of the 4-grams of a text that stand in it for the first time."""

    way: Way
    tokens_per_forward: float
    perplexity: float
    log_error: float
    distinct: float


def held_out(loaded: Loaded) -> list[list[int]]:
    """Prompt and what follows it in the held-out plays, at places spread evenly over them."""
    prepared = (project_root() / "data" / "prepared").glob("shakespeare_char-*")
    folder = max(prepared, key=lambda path: path.stat().st_mtime)
    tokens = open_prepared(folder).val.tokens
    starts = torch.linspace(0, len(tokens) - PROMPT - NEW - 1, PROMPTS).long().tolist()
    return [tokens[start : start + PROMPT + NEW].tolist() for start in starts]


@torch.inference_mode()
def judge(loaded: Loaded, way: Way, texts: list[list[int]], per_forward: float) -> Figures:
    """Figures of texts, each a prompt and NEW tokens."""
    tokens = torch.tensor(texts)
    logits = loaded.model.ar_head(loaded.model(tokens[:, :-1]).hidden[:, PROMPT - 1 :])
    nats = -logits.log_softmax(-1).gather(2, tokens[:, PROMPT:, None])[..., 0].double().sum(1)
    mean, error = ratio(nats.tolist(), [NEW] * len(texts))
    grams = [{tuple(text[i : i + 4]) for i in range(PROMPT, PROMPT + NEW - 3)} for text in texts]
    distinct = sum(map(len, grams)) / (len(texts) * (NEW - 3))
    return Figures(way, per_forward, math.exp(mean), error, distinct)


def write(loaded: Loaded, way: Way) -> Figures:
    """Continue the prompts in one way and judge it."""
    texts = held_out(loaded)
    if way.mode is None:
        return judge(loaded, way, texts, 1.0)
    texts = [text[:PROMPT] for text in texts]
    allowed = writable(loaded.tokenizer, loaded.config.vocab_size)
    allowed[loaded.tokenizer.end_id] = False  # equally long texts
    sampling = SamplingConfig(way.mode, max_new_tokens=NEW, temperature=way.temperature, **way.choices)
    forwards, busy = 0, [True] * len(texts)
    for step in generate(loaded.model, list(texts), sampling, allowed=allowed, mask_id=loaded.tokenizer.mask_id):
        forwards += sum(busy)
        busy = [not finished for finished in step.finished]
        texts = [text + new for text, new in zip(texts, step.tokens, strict=True)]
    return judge(loaded, way, texts, len(texts) * NEW / forwards)


def ways(masks: str, block: int) -> list[Way]:
    """What is compared for a model; the first three are references."""
    found = [Way(masks, None, 1.0), Way(masks, "ar", 1.0), Way(masks, "ar", 0.0)]
    for order in ("confidence", "left_to_right"):
        found += [Way(masks, "diffusion", 1.0, {"order": order, "steps": n}) for n in STEPS if n <= block]
        if masks == "random":
            found += [Way(masks, "diffusion", 1.0, {"order": order, "confidence": c}) for c in CONFIDENCES]
    for temperature in (1.0, 0.0):
        found += [Way(masks, "tidar", temperature, {"trust": t}) for t in (TRUSTS if masks == "full" else (0.0,))]
    return found


def measure(models: dict[str, Loaded]) -> list[Figures]:
    """Every way of both models; a table on the screen."""
    found = []
    print("| masks in training | way | temperature | tokens per forward | perplexity | distinct 4-grams |")
    print("|---" * 6 + "|")
    for masks, loaded in models.items():
        for way in ways(masks, loaded.config.tidar.block_length):
            made = write(loaded, way)
            found.append(made)
            perplexity = f"{made.perplexity:.2f} ± {made.perplexity * made.log_error:.2f}"
            figures = f"{made.tokens_per_forward:.2f} | {perplexity} | {made.distinct:.2f}"
            print(f"| {masks} | {way.name} | {way.temperature:g} | {figures} |", flush=True)
    return found


def draw(found: list[Figures]) -> None:
    """Perplexity against steps, and against tokens per forward."""

    def pick(masks: str, mode: str | None, temperature: float, key: str = "", order: str = "") -> list[Figures]:
        return [
            made
            for made in found
            if (made.way.masks, made.way.mode, made.way.temperature) == (masks, mode, temperature)
            and (not key or key in made.way.choices)
            and (not order or made.way.choices["order"] == order)
        ]

    def line(axes: Axes, rows: list[Figures], style: str, colour: str, label: str, steps: bool = False) -> None:
        x = [made.way.choices["steps"] if steps else made.tokens_per_forward for made in rows]
        axes.plot(x, [made.perplexity for made in rows], style, color=colour, label=label)

    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", sharey=True)
        for axes, masks in zip(panels, ("random", "random", "full"), strict=True):
            for mode, style, label in (("ar", "-", "AR samples"), (None, ":", "held-out text")):
                axes.axhline(pick(masks, mode, 1.0)[0].perplexity, color=GREY, linestyle=style, label=label)
        for order, colour in (("confidence", BLUE), ("left_to_right", ORANGE)):
            by_steps = pick("random", "diffusion", 1.0, "steps", order)
            by_confidence = pick("random", "diffusion", 1.0, "confidence", order)
            line(panels[0], by_steps, "o-", colour, f"{order}, random masks", True)
            line(panels[0], pick("full", "diffusion", 1.0, "steps", order), "s:", colour, f"{order}, full masks", True)
            line(panels[1], by_steps, "o-", colour, f"{order}, by steps")
            line(panels[1], by_confidence, "^--", colour, f"{order}, by confidence")
        line(panels[1], pick("random", "tidar", 1.0), "*", GREEN, "TiDAR, exact")
        for temperature, style in ((1.0, "o-"), (0.0, "s:")):
            rows = pick("full", "tidar", temperature)
            line(panels[2], rows, style, GREEN, f"trust 0 to 1, temperature {temperature:g}")
            for i, made in enumerate(rows):
                place, text = (made.tokens_per_forward, made.perplexity), f"{made.way.choices['trust']:g}"
                panels[2].annotate(text, place, (-4, -13 if i % 2 else 7), textcoords="offset points", fontsize=8)
        panels[0].set(xscale="log", yscale="log", ylabel="perplexity of the text under the AR head")
        panels[0].set_xticks(STEPS, [str(n) for n in STEPS])
        ticks = (2, 3, 5, 10, 20, 50, 100)  # of all panels
        panels[0].set_yticks(ticks, [str(n) for n in ticks])
        titles = ("Diffusion by steps", "Diffusion by forwards", "TiDAR with trust")
        for axes, title in zip(panels, titles, strict=True):
            axes.set(title=title, xlabel="forwards per block" if axes is panels[0] else "tokens per forward")
            axes.minorticks_off()
            axes.legend(fontsize=8, loc="lower center" if axes is panels[0] else "best", ncols=1 + (axes is panels[0]))
        panels[0].set_ylim(1.5)
        figure.savefig(HERE / "diffusion.png")


def main() -> None:
    runs = sys.argv[1:] or ["block-diffusion", "chain"]
    if len(runs) != 2:
        sys.exit("give two runs, one trained with random masks, one with full masks, or none")
    found = measure({masks: checkpoint.load(find_checkpoint(run)) for masks, run in zip(MASKS, runs, strict=True)})
    with open(HERE / "diffusion.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["masks", "way", "temperature", "tokens_per_forward", "perplexity", "log_error", "distinct"])
        for made in found:
            row = (made.tokens_per_forward, made.perplexity, made.log_error, made.distinct)
            writer.writerow([made.way.masks, made.way.name, made.way.temperature, *(round(value, 4) for value in row)])
    draw(found)


if __name__ == "__main__":
    guard(main)
