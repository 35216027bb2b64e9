"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, and say how to go on."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from elara.errors import Interrupted
from elara.launch import SIGNALS, global_rank
from elara.training.callbacks.checkpoint import Checkpoint


class Interrupt(Callback):
    """The first signal lets the running step end and saves `last`; a second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        # Behind Lightning, whose own SIGTERM handler would end the run between two hooks, unsaved and with exit code 0
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise Interrupted("stopped at once; what came behind the last checkpoint is lost")
        self._asked = True
        if global_rank() == 0:
            os.write(2, b"\nstopping behind this step (once more: at once)\n")  # print is not safe in a signal handler

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if not module.step_ends(batch_idx) or not self._agreed(trainer):
            return
        saver = next((c for c in trainer.callbacks if isinstance(c, Checkpoint)), None)  # type: ignore[attr-defined]
        if saver is None:
            raise Interrupted(f"interrupted at step {trainer.global_step}; nothing was saved (no checkpoint callback)")
        saver.save(trainer, module)
        how = f"python -m elara.train resume={saver.run.path}"
        raise Interrupted(f"interrupted at step {trainer.global_step}, saved; go on with: {how}", saved=True)

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to stop. Ranks compare notes only now and then, as that makes them wait."""
        if trainer.world_size == 1:
            return self._asked
        if trainer.global_step % 10:
            return False
        asked = torch.tensor(float(self._asked), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(asked, reduce_op="sum"))

    def teardown(self, trainer: Trainer, module: Any, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
