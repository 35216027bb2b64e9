"""From the names of cases to figures, and from figures to a table, a JSON file and a picture."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from hydra import compose
from matplotlib.figure import Figure as Picture
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from elara.bench import cases
from elara.bench.measure import Figure
from elara.config import ElaraConfig
from elara.errors import ElaraError

CHARACTERS = 128  # vocabulary of the sizes that leave it to their tokenizer


def run(names: list[str], rounds: int, device: str, threads: int | None, folder: Path) -> None:
    """Measure, print as figures come in, then write bench.json and bench.png into `folder`."""
    unknown = [name for name in names if name not in CASES]
    if unknown or not names:
        raise ElaraError(f"cases={unknown or names}: choose among {', '.join(CASES)}")
    if rounds < 1 or (threads is not None and threads < 1):
        raise ElaraError(f"rounds={rounds} and threads={threads} must be at least 1")
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ElaraError(f"device={device} is not here: take auto or cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    on = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    console, figures = Console(width=None if sys.stdout.isatty() else 150), []
    for name in names:
        for figure in CASES[name](on, rounds):
            console.print(f"{figure.name}: {figure.ratio:.2f}", highlight=False, soft_wrap=True)
            figures.append(figure)
    console.print(_table(figures, on))
    _write(figures, on, folder)
    console.print(f"written: {folder}/bench.json, bench.png", highlight=False, soft_wrap=True)


def _size(name: str, **changes: int) -> ElaraConfig:
    """The architecture of a size with all three ideas on."""
    sizes = [f"model.{key}={value}" for key, value in changes.items()]
    composed = compose("train", overrides=[f"model={name}", *sizes])
    groups = {group: OmegaConf.to_container(composed[group]) for group in ("model", "moe", "trm", "tidar")}
    config = ElaraConfig.from_dict(groups)
    return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or CHARACTERS))


def _training_step(device: torch.device, rounds: int) -> Iterator[Figure]:
    # two blocks at half the width, without the vocabulary: the 2.8 B model's proportions, small enough for a CPU
    seed = _size("elara_2p8b", n_layer=2, n_embd=640, hidden=2048, vocab_size=2048)
    yield from cases.training_step("elara_2p8b's proportions", seed, device, max(3, rounds // 2), 8, 256)
    nano = _size("elara_nano")
    yield from cases.training_step("elara_nano", nano, device, rounds, 8, nano.model.context_length)


def _tidar_step(device: torch.device, rounds: int) -> Iterator[Figure]:
    nano = _size("elara_nano")
    yield from cases.tidar_step(nano, device, rounds, 8, nano.model.context_length)


CASES: dict[str, Callable[[torch.device, int], Iterator[Figure]]] = {
    "moe_layer": lambda device, rounds: cases.moe_layer(_size("elara_124m"), device, rounds),
    "training_step": _training_step,
    "tidar_step": _tidar_step,
    "decoding": lambda device, rounds: cases.decoding(_size("elara_tiny"), device, max(3, rounds // 2)),
}


def _table(figures: list[Figure], device: torch.device) -> Table:
    table = Table(title=f"{_hardware(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for column in ("", "ratio", "quartiles", "target", "subject ms", "reference ms", "of"):
        table.add_column(column, justify="left" if column in ("", "of") else "right")
    for f in figures:
        mark = "" if f.met else " missed"
        table.add_row(
            f.name,
            f"{f.ratio:.2f}",
            f"{f.low:.2f}-{f.high:.2f}",
            f"{'>=' if f.faster else '<='} {f.target}{mark}",
            f"{1e3 * f.subject_seconds:.1f}",
            f"{1e3 * f.reference_seconds:.1f}",
            f.note,
        )
    return table


def _write(figures: list[Figure], device: torch.device, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"hardware": _hardware(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    result = {**about, "figures": [{**asdict(f), "met": f.met} for f in figures]}
    (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    picture = Picture(figsize=(9, 0.5 * len(figures) + 1.4), layout="constrained")
    axes = picture.subplots()
    for place, f in enumerate(reversed(figures)):
        share = f.target / f.ratio if f.faster else f.ratio / f.target  # 1 = exactly at the target, less is better
        axes.barh(place, share, color="#3a8f5c" if f.met else "#d9722b", height=0.6)
        sign = "at least" if f.faster else "at most"
        axes.text(share + 0.01, place, f"{f.ratio:.2f} ({sign} {f.target})", va="center", fontsize=8)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_yticks(range(len(figures)), [f.name for f in reversed(figures)], fontsize=8)
    axes.set_xlim(0, 1.35 * max(1.0, *(f.target / f.ratio if f.faster else f.ratio / f.target for f in figures)))
    axes.set_xlabel("cost relative to the target (left of the line: met)")
    axes.set_title(f"Speed on {_hardware(device)}", loc="left")
    picture.savefig(folder / "bench.png", dpi=150)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
