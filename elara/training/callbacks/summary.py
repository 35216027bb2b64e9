"""summary.json: what came out of a run, of which code, on which machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from elara.checkpoint import write_json
from elara.device import device_name
from elara.runs import CHECKOUT, Run
from elara.training.callbacks.ending import is_finished

PACKAGES = (
    "elara-hivemind",
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "numpy",
    "safetensors",
    "tiktoken",
)


class Summary(Callback):
    """Written when training starts, with `finished: false`, and again when it ends, wherever that is.

    Wall time adds up over resumes; the part between the last checkpoint and a crash is not in it.
    """

    def __init__(self, folder: str) -> None:
        self.run = Run(Path(folder))
        self._began = time.monotonic()
        self._before = 0.0
        self._trained = False

    def state_dict(self) -> dict[str, Any]:
        return {"wall_seconds": self._wall()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = state["wall_seconds"]

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._write(trainer, module, finished=False)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self._trained = True

    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        finished = is_finished(trainer, module.step)
        if self._trained or finished:  # else its time was up before it began: what it wrote the last time holds
            self._write(trainer, module, finished=finished)

    def _wall(self) -> float:
        return self._before + time.monotonic() - self._began

    def _write(self, trainer: Trainer, module: Any, *, finished: bool) -> None:
        if not trainer.is_global_zero:
            return
        self.run.path.mkdir(parents=True, exist_ok=True)
        about = {
            "finished": finished,
            "steps": module.step,
            "metrics": {name: value for name, value in sorted(module.latest.items()) if not name.startswith("moe/")},
            "moe": {name: value for name, value in sorted(module.latest.items()) if name.startswith("moe/")},
            "wall_seconds": round(self._wall(), 1),
            "parameters": sum(p.numel() for p in module.model.parameters()),
            "precision": str(trainer.precision),
            "world_size": trainer.world_size,
            "commit": commit(),
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(self.run.summary, about)


def commit() -> str | None:
    """Commit of the checkout this package runs from, with `+changes` when files differ; None outside of git."""
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python, this package and what its numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores in use, memory, GPUs."""
    return {
        "platform": platform.platform(),
        "processor": device_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
