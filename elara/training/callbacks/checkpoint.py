"""Checkpoints of a run: checkpoints/step-N, with the links `last` and `best` (lowest validation loss)."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from torch import Tensor

from elara import checkpoint
from elara.data.batches import Batch
from elara.data.identity import identity
from elara.errors import ElaraError, NotFinite
from elara.runs import Run, step_of
from elara.training.callbacks.agreement import Agreement

BEST_BY = "val/loss_ar"
LOOKS = 50  # of several ranks at the clock, within every_minutes


class Checkpoint(Callback):
    """Saves before every validation, and in between every `every_minutes` and `every_n_steps` where these are given.

    A save precedes its validation, so that a crash in the latter costs nothing; its figures join meta.json afterwards.

    Args:
        folder: the run folder.
        every_n_steps: optimizer steps between further saves; None: no matter how many.
        every_minutes: what a run that is killed may lose, as the first rank's clock has it; None: no matter how long.
        keep: newest checkpoints to keep beside the best one; older ones are deleted.
        parent: checkpoint this run started from, for meta.json.
    """

    def __init__(
        self, folder: str, every_n_steps: int | None = None, every_minutes: float | None = None, keep: int = 2,
        parent: str | None = None,
    ) -> None:  # fmt: skip
        if keep < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ElaraError("callbacks.checkpoint: keep and every_n_steps must be at least 1")
        if every_minutes is not None and not every_minutes > 0:
            raise ElaraError(f"callbacks.checkpoint.every_minutes={every_minutes} must be above 0, or null for none")
        self.run = Run(Path(folder))
        self.every_minutes = math.inf if every_minutes is None else every_minutes
        self._saved_at = math.inf  # seconds of the clock
        self._time_is_up = Agreement(60 * self.every_minutes / LOOKS, most=1000)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.parent = parent
        self.saved_step = -1

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not module.step_ends(batch_idx):
            return
        regular = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        final = trainer.global_step == trainer.max_steps
        late = trainer.is_global_zero and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        timely = self.every_minutes < math.inf and self._time_is_up(trainer, late)
        if regular or timely or final or module.validates(batch_idx):
            self.save(trainer, module, validation_due=module.validates(batch_idx))

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        folder = self.run.path / "checkpoints" / f"step-{module.step}"
        if not trainer.is_global_zero or not folder.is_dir():
            return
        figures = {name: value for name, value in module.latest.items() if name.startswith("val/")}
        meta = checkpoint.read_meta(folder)
        checkpoint.write_json(folder / checkpoint.META, {**meta, "validation_due": False, "metrics": figures})
        self._choose_best()
        self._prune()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        """Mark the checkpoint whose validation gave no numbers, so that no run goes on from it."""
        folder = self.run.path / "checkpoints" / f"step-{module.step}"
        if isinstance(exception, NotFinite) and trainer.validating and trainer.is_global_zero and folder.is_dir():
            checkpoint.write_json(folder / checkpoint.META, {**checkpoint.read_meta(folder), "finite": False})

    def save(self, trainer: Trainer, module: Any, *, validation_due: bool = False) -> None:
        """Write checkpoints/step-N and point `last` to it. Every rank calls this; the first one writes.

        Raises NotFinite, before anything is written or deleted, when the weights or the losses since the last log are
        nan or infinite: the last good checkpoint stays.

        validation_due: this step is going to be validated; a run killed before that is over makes up for it.
        """
        step = trainer.global_step
        if step == self.saved_step:
            return
        module.check_state()
        self.saved_step = step
        for logger in trainer.loggers:
            logger.save()  # a row that the checkpoint lies behind must not be lost with the process
        folder = self.run.path / "checkpoints" / f"step-{step}"
        if not trainer.is_global_zero:
            try:
                trainer.save_checkpoint(folder)  # takes part in gathering states and in writing shards
            except OSError as error:
                raise checkpoint.unwritable(folder, error) from error
            module.saved_weights = {}
            return

        def trainer_state(path: Path) -> Mapping[str, Tensor]:
            trainer.save_checkpoint(path)
            weights: Mapping[str, Tensor] = module.saved_weights
            module.saved_weights = {}
            return weights

        data = trainer.datamodule  # type: ignore[attr-defined]
        meta = {
            "step": step,
            "read": [part._asdict() for part in data.consumed(module.batches_since_start)],
            "text": identity(data),
            "validation_due": validation_due,
            "run": str(self.run.path),
            "parent": self.parent,
        }
        if data.chat:
            meta["chat"] = True  # exports carry the chat template, and elara.sample asks instead of continuing
        checkpoint.save(folder, module.model, module.tokenizer, meta=meta, trainer_state=trainer_state)
        checkpoint.link(folder, self.run.last)
        self._saved_at = time.monotonic()
        self._prune()

    def _choose_best(self) -> None:
        losses = {folder: validation_loss(folder) for folder in self.run.checkpoints()}
        finite = {folder: loss for folder, loss in losses.items() if math.isfinite(loss)}
        if finite:
            checkpoint.link(min(finite, key=lambda folder: (finite[folder], step_of(folder))), self.run.best)

    def _prune(self) -> None:
        folders = self.run.checkpoints()
        keep = {step_of(folder) for folder in folders[: self.keep]}
        keep |= {step_of(link) for link in (self.run.best, self.run.last)}
        for folder in folders:
            if step_of(folder) not in keep:
                doomed = folder.with_name(f".{folder.name}-old-{uuid.uuid4().hex[:8]}")
                folder.rename(doomed)  # a half-deleted folder must not look like a checkpoint
                shutil.rmtree(doomed, ignore_errors=True)


def saver_of(trainer: Trainer) -> Checkpoint | None:
    """The callback that saves; None in a run without one."""
    return next((c for c in trainer.callbacks if isinstance(c, Checkpoint)), None)  # type: ignore[attr-defined]


def validation_loss(folder: Path) -> float:
    """The loss that `best` is chosen by; inf while a checkpoint has not been validated."""
    try:
        return float(checkpoint.read_meta(folder).get("metrics", {}).get(BEST_BY, math.inf))
    except ElaraError:
        return math.inf
