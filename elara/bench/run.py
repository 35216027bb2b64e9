"""From the names of cases to figures, printed as they come in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hydra import compose
from omegaconf import OmegaConf
from rich.console import Console

from elara import checkpoint
from elara.bench import decoding, lightning, limits, loading, memory, training
from elara.bench.measure import Figure
from elara.bench.report import table, write
from elara.config import ElaraConfig
from elara.errors import ElaraError
from elara.runs import find_checkpoint

CHARACTERS = 128  # vocabulary of the sizes that leave it to their tokenizer


@dataclass
class Setting:
    """What every case is told. trained: the model to decode with in `decode_modes`, None = random weights."""

    device: torch.device
    rounds: int
    trained: decoding.Trained | None

    @property
    def few(self) -> int:
        """Rounds of what takes long."""
        return min(self.rounds, max(3, self.rounds // 2))


def run(
    names: list[str], rounds: int, device: str, threads: int | None, wanted: str | None, folder: Path
) -> None:
    """Measure, print as figures come in, then write bench.json and bench.png into `folder`.

    wanted: checkpoint folder, run folder or run name whose model `decode_modes` decodes with.
    """
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
    setting = Setting(on, rounds, None if wanted is None else _trained(wanted, on))
    console, figures = Console(width=None if sys.stdout.isatty() else 180), []
    measured = _limits(on)
    for name, value in measured.items():
        console.print(f"limit: {name} {value / 1e9:,.1f} G/s", highlight=False, soft_wrap=True)
    for name in names:
        for figure in CASES[name](setting):
            console.print(f"{figure.name}: {figure.ratio:.2f}", highlight=False, soft_wrap=True)
            figures.append(figure)
    console.print(table(figures, on))
    write(figures, measured, on, folder)
    console.print(f"written: {folder}/bench.json, bench.png", highlight=False, soft_wrap=True)


def _limits(device: torch.device) -> dict[str, float]:
    found = {"memory bandwidth, bytes": limits.bandwidth(device)}
    for name, dtype in training.DTYPES.items():
        found[f"matmul in {name}, FLOP"] = limits.matmul_rate(device, dtype)
    return found


def _trained(wanted: str, device: torch.device) -> decoding.Trained:
    path = find_checkpoint(wanted)
    loaded = checkpoint.load(path, device=device)
    if not loaded.config.tidar.block_length:
        raise ElaraError(f"checkpoint={wanted} has no diffusion head: give one trained with tidar=full_mask")
    checkpoint.check_finite(path, loaded.model.state_dict())
    return decoding.Trained(loaded.model, loaded.tokenizer.mask_id, wanted)


def _size(name: str, **changes: int) -> ElaraConfig:
    """The architecture of a size with all three ideas on."""
    return _composed(f"model={name}", *(f"model.{key}={value}" for key, value in changes.items()))


def _composed(*overrides: str) -> ElaraConfig:
    composed = compose("train", overrides=list(overrides))
    groups = {group: OmegaConf.to_container(composed[group]) for group in ("model", "moe", "trm", "tidar")}
    config = ElaraConfig.from_dict(groups)
    return replace(config, model=replace(config.model, vocab_size=config.model.vocab_size or CHARACTERS))


def _large(device: torch.device) -> ElaraConfig:
    """elara_2p8b; on a CPU four of its blocks: 217 M active parameters of 404 M, enough to be bound by memory."""
    return _size("elara_2p8b") if device.type == "cuda" else _size("elara_2p8b", n_layer=4)


def _training_step(setting: Setting) -> Iterator[Figure]:
    # two blocks at half the width, without the vocabulary: the 2.8 B model's proportions, small enough for a CPU
    seed = _size("elara_2p8b", n_layer=2, n_embd=640, hidden=2048, vocab_size=2048)
    yield from training.training_step("elara_2p8b's proportions", seed, setting.device, setting.few, 4, 256)
    nano = _size("elara_nano")
    yield from training.training_step("elara_nano", nano, setting.device, setting.rounds, 8, nano.model.context_length)


def _tidar_step(setting: Setting) -> Iterator[Figure]:
    nano = _size("elara_nano")
    yield from training.tidar_step(nano, setting.device, setting.rounds, 8, nano.model.context_length)


def _decoding(setting: Setting) -> Iterator[Figure]:
    yield from decoding.against_no_cache(_size("elara_tiny"), setting.device, setting.few)
    if setting.device.type == "cuda":
        yield from decoding.graph(_large(setting.device), setting.device, setting.rounds)


def _forward_cost(setting: Setting) -> Iterator[Figure]:
    yield from decoding.forward_cost("elara_nano", _size("elara_nano"), setting.device, setting.rounds)
    name = "elara_2p8b" if setting.device.type == "cuda" else "4 blocks of elara_2p8b"
    yield from decoding.forward_cost(name, _large(setting.device), setting.device, setting.few)


def _memory(setting: Setting) -> Iterator[Figure]:
    config = _size("elara_2p8b", n_layer=8, n_embd=640, hidden=2048, vocab_size=2048)
    yield from memory.memory(config, setting.device)


def _lightning(setting: Setting) -> Iterator[Figure]:
    yield from lightning.overhead(3 * setting.rounds, setting.device)


def _data(setting: Setting) -> Iterator[Figure]:
    # what takes the most tokens a second: nothing else could be held up sooner
    on_gpu = setting.device.type == "cuda"
    config = _composed("model=elara_124m", "tidar=none") if on_gpu else _composed("experiment=plain_char")
    what, batch = ("elara_124m", 32) if on_gpu else ("experiment=plain_char", 12)
    step, tokens = training.fastest_step(config, batch, setting.device)
    yield from loading.loading(what, step, tokens, setting.device, setting.rounds)


CASES: dict[str, Callable[[Setting], Iterator[Figure]]] = {
    "moe_layer": lambda s: training.moe_layer(_size("elara_124m"), s.device, s.rounds),
    "training_step": _training_step,
    "tidar_step": _tidar_step,
    "decoding": _decoding,
    "decode_modes": lambda s: decoding.modes(_size("elara_nano"), s.device, s.few, s.trained),
    "forward_cost": _forward_cost,
    "precision": lambda s: decoding.precision(_large(s.device), s.device, s.few),
    "memory": _memory,
    "lightning": _lightning,
    "data": _data,
}
