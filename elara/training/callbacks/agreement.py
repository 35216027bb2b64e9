"""One answer for all ranks to a question that each of them would answer by itself: was I asked to stop, is it time?"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from lightning import Trainer


class Agreement:
    """Whether any rank says yes; all of them hear it after the same step.

    Comparing notes makes the ranks wait for each other, so they do it every few steps only.

    Args:
        seconds: between the ranks' looks at each other, where steps are shorter.
        most: steps between them at most.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._compare_at = 0  # step at which the ranks compare notes next
        self._compared = 0.0  # when they last did
        self._since = 0  # steps done then

    def __call__(self, trainer: Trainer, yes: bool) -> bool:
        """Every rank asks after every step; one process alone hears its own answer at once."""
        if trainer.world_size == 1:
            return yes
        if trainer.global_step < self._compare_at:
            return False
        now = time.monotonic()
        pace = (now - self._compared) / max(1, trainer.global_step - self._since) if self._compared else self._seconds
        notes = torch.tensor([float(yes), pace], device=trainer.strategy.root_device)
        dist.all_reduce(notes, dist.ReduceOp.MAX)
        anyone, slowest = notes.tolist()
        self._compared, self._since = now, trainer.global_step
        self._compare_at = trainer.global_step + max(1, min(self._most, int(self._seconds / max(slowest, 1e-3))))
        return bool(anyone)
