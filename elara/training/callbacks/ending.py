"""How training ends: after a whole optimizer step, with that step saved, whatever asked for the end."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from elara.data.batches import Batch
from elara.training.callbacks.checkpoint import saver_of

ENOUGH = (
    EarlyStoppingReason.STOPPING_THRESHOLD,
    EarlyStoppingReason.DIVERGENCE_THRESHOLD,
    EarlyStoppingReason.PATIENCE_EXHAUSTED,
)


class Ending(Callback):
    """Part of every run, after all other callbacks, so that it hears what any of them asks for (`trainer.should_stop`).

    Lightning would end between two micro-batches of a step, whose gradients were lost, and after all had saved.
    """

    def __init__(self) -> None:
        self._asked = False

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not module.step_ends(batch_idx):
            self._asked |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._asked
        if module.stops and (saver := saver_of(trainer)) is not None:
            saver.save(trainer, module, validation_due=module.validates(batch_idx))


def is_finished(trainer: Trainer, step: int) -> bool:
    """Whether a run that ended after `step` reached its last step, or early stopping saw no use in more of them."""
    stoppers = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return step >= trainer.max_steps or any(stopper.stopping_reason in ENOUGH for stopper in stoppers)
