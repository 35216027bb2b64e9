"""Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP: finish the step, save, and say how to go on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from types import FrameType
from typing import Any

from lightning import Callback, Trainer

from elara.data.batches import Batch
from elara.errors import Interrupted
from elara.launch import global_rank, signals
from elara.runs import python
from elara.training.callbacks.agreement import Agreement
from elara.training.callbacks.checkpoint import saver_of

SECONDS = 2.0  # between the ranks' looks at each other, where steps are shorter


class Interrupt(Callback):
    """A signal lets the running step end and saves `last`; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._asked = False
        self._interrupts = 0
        self._any_rank = Agreement(SECONDS, most=10)
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        # Behind Lightning, whose own SIGTERM handler would end the run between two hooks, unsaved and with exit code 0
        for number in signals():
            self._previous[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise Interrupted("stopped at once; what came behind the last checkpoint is lost")
        if self._asked:
            return  # a scheduler's second word, or that of a parent that has gone: saving is under way
        self._asked = True
        if global_rank() == 0:
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                os.write(2, b"\nstopping after this step (once more: at once)\n")  # print is not safe in a handler

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not module.step_ends(batch_idx) or not self._any_rank(trainer, self._asked):
            return
        if (saver := saver_of(trainer)) is None:
            raise Interrupted(f"interrupted at step {trainer.global_step}; nothing was saved (no checkpoint callback)")
        saver.save(trainer, module)
        how = f"{python()} -m elara.train resume={shlex.quote(str(saver.run.path))}"
        raise Interrupted(f"interrupted at step {trainer.global_step}, saved; go on with: {how}", saved=True)

    def teardown(self, trainer: Trainer, module: Any, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
