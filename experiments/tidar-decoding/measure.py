"""Tokens per forward and wall clock of TiDAR decoding against plain decoding, interleaved, on held-out prompts.

python experiments/tidar-decoding/measure.py RUN [--precision bfloat16] [--prompts 8] [--new 160] [--rounds 3]
python experiments/tidar-decoding/measure.py RUN --varied

Writes <run's name>-<precision>.json beside this script and draws decoding.png from all such files. --varied: 50 prompts
of four kinds (the held-out text, verse, random characters, repetition) through the controller alone, 7 rounds each.
"""

import argparse
import json
import random
import re
import statistics
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from elara import checkpoint
from elara.cli import guard
from elara.decoding import Controller, SamplingConfig, calibrate, generate, writable
from elara.evaluation.drafts import held_out_prompts
from elara.evaluation.models import data_of
from elara.evaluation.text import held_out_text
from elara.runs import find_checkpoint, project_root

HERE = Path(__file__).parent
VERSE = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate. Rough winds do shake "


class Writer:
    """A loaded model that writes greedily and reports seconds, tokens and forwards."""

    def __init__(self, where, precision):
        folder = find_checkpoint(where)
        self.loaded = checkpoint.load(folder, precision=precision)
        self.tokenizer, self.model = self.loaded.tokenizer, self.loaded.model
        self.allowed = writable(self.tokenizer, self.model.config.vocab_size)
        text = held_out_text(data_of(folder), project_root() / "data", max_bytes=60_000)
        self.prompts = lambda count: held_out_prompts(text, self.tokenizer, count, 96)

    def run(self, prompt, new, controller=None, **options):
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=new, **options)
        started, tokens, forwards = time.perf_counter(), [], 0
        for step in generate(
            self.model, [prompt], sampling, allowed=self.allowed, mask_id=self.tokenizer.mask_id, controller=controller
        ):
            tokens += step.tokens[0]
            forwards += 1
        return time.perf_counter() - started, tokens, forwards


def by_draft_length(writer, costs, args):
    """Every fixed plan and the controller against plain decoding, prompt by prompt."""
    longest = writer.model.config.tidar.block_length
    plain = costs.seconds[1, 0, 0]
    ways = {"plain": {"mode": "ar"}}
    for length in [n for n in (2, 4, 8, 16) if n <= longest]:
        ways[f"{length}, all groups"] = {"mode": "tidar", "draft_length": length}
        ways[f"{length}, 2 groups"] = {"mode": "tidar", "draft_length": length, "groups": 2}
    ways["controller"] = {"mode": "tidar"}
    seconds, counts, same = {w: [] for w in ways}, {w: [0, 0] for w in ways}, dict.fromkeys(ways, 0)
    prompts = writer.prompts(args.prompts)
    for prompt in prompts:
        for _ in range(args.rounds):
            reference = None  # what plain decoding, the first way, writes
            for way, options in ways.items():
                controller = Controller(costs) if way == "controller" else None
                took, tokens, forwards = writer.run(prompt, args.new, controller, **options)
                seconds[way].append(took)
                counts[way][0] += len(tokens)
                counts[way][1] += forwards
                reference = reference or tokens
                same[way] += tokens == reference
    found = {}
    for way, options in ways.items():
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[way], strict=True)]
        per_forward = counts[way][0] / counts[way][1]
        found[way] = {
            "tokens_per_forward": per_forward,
            "speed_up": statistics.median(ratios),
            "tokens_per_second": args.new / statistics.median(seconds[way]),
            "same_text": same[way] / len(ratios),
        }
        length, groups = options.get("draft_length"), options.get("groups")
        if length and (groups is None or length == 2):
            cost = costs.seconds[length, length, length] / plain
            found[way] |= {"cost": cost, "promised": per_forward / cost}
    return found


def varied(writer, costs, args):
    """The controller's worst case: the median ratio of 7 interleaved runs for each of 50 prompts."""
    random.seed(0)
    letters = [i for i in writer.allowed.nonzero()[:, 0].tolist() if i != writer.tokenizer.end_id]
    prompts = {f"held-out {i}": p for i, p in enumerate(writer.prompts(14))}
    verse = writer.tokenizer.encode(VERSE)
    prompts |= {f"verse {i}": verse[3 * i : 3 * i + 60] for i in range(12)}
    prompts |= {f"random {i}": random.choices(letters, k=random.randint(1, 120)) for i in range(12)}
    prompts |= {f"repetition {i}": random.choices(letters, k=i + 1) * 8 for i in range(12)}
    ratios = {}
    for name, prompt in prompts.items():
        pairs = []
        for _ in range(7):
            plain = writer.run(prompt, args.new, mode="ar")[0]
            pairs.append(plain / writer.run(prompt, args.new, Controller(costs), mode="tidar")[0])
        ratios[name] = statistics.median(pairs)
        print(f"{name}: {ratios[name]:.3f}", flush=True)
    return ratios


def way_is_whole(way):
    return way.endswith("all groups")


def reachable(costs, chance):
    """The best plan's speed-up when every proposal stands with this chance; costs: in plain steps, by what is read."""
    best = 1.0
    for read, groups, masks in costs:
        if read == 1 or not groups:
            continue
        stand = [chance**j - (chance ** (j + 1) if j + 1 < read else 0) for j in range(read)]  # exactly j + 1 tokens
        again = sum(sorted(stand)[-groups:])  # the next step has a draft as well
        share = 1 / (2 - again)
        tokens = share * sum(chance**j for j in range(read)) + 1 - share
        best = max(best, tokens / (share * costs[read, groups, masks] + (1 - share) * costs[1, 1, masks]))
    return best


def draw():
    files = [json.loads(path.read_text()) for path in sorted(HERE.glob("*-*.json"))]
    results = [result for result in files if "ways" in result]
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for result in results:
        ways = {k: v for k, v in result["ways"].items() if way_is_whole(k)}
        lengths = [int(way.split(",")[0]) for way in ways]
        label = f"{result['run']}, {result['precision']}"
        axes[0].plot(lengths, [v["tokens_per_forward"] for v in ways.values()], "o-", label=label)
        (line,) = axes[1].plot(lengths, [v["speed_up"] for v in ways.values()], "o-", label=label)
        axes[1].plot(lengths, [v["promised"] for v in ways.values()], ":", color=line.get_color())
        controller = result["ways"]["controller"]["speed_up"]
        axes[1].axhline(controller, color=line.get_color(), linewidth=0.8, linestyle="--")
        costs = {tuple(map(int, re.findall(r"\d+", key))): cost for key, cost in result["costs"].items()}
        chances = [0.3 + 0.01 * i for i in range(71)]
        axes[2].plot(chances, [reachable(costs, chance) for chance in chances], color=line.get_color(), label=label)
    axes[0].set(xlabel="draft length", ylabel="tokens per forward", ylim=(1, None))
    axes[1].set(xlabel="draft length", ylabel="speed-up over plain decoding")
    axes[1].axhline(1, color="grey", linewidth=0.8)
    axes[1].set_title("dotted: promised by cost; dashed: the controller", fontsize=9, loc="left")
    axes[2].set(xlabel="chance that a proposal stands", ylabel="speed-up of the best plan, by costs")
    axes[2].axhline(1.5, color="grey", linewidth=0.8)
    for axis in axes[:2]:
        axis.set_xscale("log", base=2)
        axis.set_xticks([2, 4, 8], ["2", "4", "8"])
    for axis in (axes[0], axes[2]):
        axis.legend(fontsize=8)
    figure.savefig(HERE / "decoding.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--varied", action="store_true")
    args = parser.parse_args()
    writer = Writer(args.run, args.precision)
    name = Path(args.run).name if not Path(args.run).exists() else find_checkpoint(args.run).resolve().parents[2].name
    file = HERE / f"{name}-{args.precision}.json"
    started = time.perf_counter()
    costs = calibrate(writer.model, writer.tokenizer.mask_id, allowed=writer.allowed)
    result = json.loads(file.read_text()) if file.exists() else {}
    result |= {"run": name, "precision": args.precision, "threads": torch.get_num_threads()}
    result |= {"calibration_seconds": time.perf_counter() - started}
    if args.varied:
        result["varied"] = varied(writer, costs, args)
        print("worst:", min(result["varied"].items(), key=lambda item: item[1]))
    else:
        plain = costs.seconds[1, 0, 0]
        result["costs"] = {f"{a} tokens, {g} groups of {m}": s / plain for (a, g, m), s in costs.seconds.items()}
        result["ways"] = by_draft_length(writer, costs, args)
        for way, figures in result["ways"].items():
            print(f"{way:14s}", "  ".join(f"{key} {value:.2f}" for key, value in figures.items()))
    file.write_text(json.dumps(result, indent=1) + "\n")
    draw()


if __name__ == "__main__":
    guard(main)
