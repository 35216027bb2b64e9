"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, and say how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer

from elara.data.batches import Batch
from elara.errors import Interrupted
from elara.launch import SIGNALS, global_rank
from elara.training.callbacks.checkpoint import saver_of

SECONDS = 2.0  # between the ranks' looks at each other, where steps are shorter


class Interrupt(Callback):
    """A signal lets the running step end and saves `last`; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self._interrupts = 0
        self._compare_at = 0  # step at which the ranks compare notes next
        self._compared = 0.0  # when they last did
        self._since = 0  # steps done then
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        # Behind Lightning, whose own SIGTERM handler would end the run between two hooks, unsaved and with exit code 0
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise Interrupted("stopped at once; what came behind the last checkpoint is lost")
        if self._asked:
            return  # a scheduler's second word, or that of a parent that has gone: saving is under way
        self._asked = True
        if global_rank() == 0:
            os.write(2, b"\nstopping behind this step (once more: at once)\n")  # print is not safe in a signal handler

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not module.step_ends(batch_idx) or not self._agreed(trainer):
            return
        if (saver := saver_of(trainer)) is None:
            raise Interrupted(f"interrupted at step {trainer.global_step}; nothing was saved (no checkpoint callback)")
        saver.save(trainer, module)
        how = f"python -m elara.train resume={shlex.quote(str(saver.run.path))}"
        raise Interrupted(f"interrupted at step {trainer.global_step}, saved; go on with: {how}", saved=True)

    def _agreed(self, trainer: Trainer) -> bool:
        """Whether any rank was asked to stop. Comparing notes makes the ranks wait, so they do it every few steps."""
        if trainer.world_size == 1:
            return self._asked
        if trainer.global_step < self._compare_at:
            return False
        now = time.monotonic()
        pace = (now - self._compared) / max(1, trainer.global_step - self._since) if self._compared else SECONDS
        notes = torch.tensor([float(self._asked), pace], device=trainer.strategy.root_device)
        dist.all_reduce(notes, dist.ReduceOp.MAX)
        asked, slowest = notes.tolist()
        self._compared, self._since = now, trainer.global_step
        self._compare_at = trainer.global_step + max(1, min(10, int(SECONDS / max(slowest, 1e-3))))
        return bool(asked)

    def teardown(self, trainer: Trainer, module: Any, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
