"""The random states of Python, NumPy and PyTorch go into every checkpoint, for every rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import Callback, Trainer

from elara.data.batches import Batch


class ExactResume(Callback):
    """With it, a run that was killed and resumed computes bit for bit what an uninterrupted run does.

    Validation and what hangs on it leave the random states as they found them. The data's position is the data
    module's own state.
    """

    def __init__(self) -> None:
        self._restore: dict[str, Any] | None = None
        self._before: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [random_state()]
        if dist.is_available() and dist.is_initialized():
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, random_state())
        checkpoint["elara_random"] = states

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("elara_random", [])
        if trainer.global_rank < len(states):
            self._restore = states[trainer.global_rank]

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        # not earlier: making the loaders' iterators draws from torch's generator
        if self._restore is not None:
            set_random_state(self._restore)
            self._restore = None

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if module.validates(batch_idx):
            self._before = random_state()

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if self._before is not None:
            set_random_state(self._before)
            self._before = None


def random_state() -> dict[str, Any]:
    """All random states as plain values: they pass between ranks, and `torch.load(weights_only=True)` reads them."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
