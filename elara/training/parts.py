"""What a run is made of, and how it speaks."""

from __future__ import annotations

from dataclasses import dataclass

import lightning

from elara.data.module import ElaraData
from elara.launch import global_rank
from elara.training.module import ElaraModule
from elara.training.sharding import FSDP


@dataclass
class Parts:
    """What a run is made of."""

    trainer: lightning.Trainer
    module: ElaraModule
    data: ElaraData


def elsewhere(trainer: lightning.Trainer) -> bool:
    """Whether another rank holds the weights until they are sharded."""
    return isinstance(trainer.strategy, FSDP) and global_rank() > 0


def say(line: str) -> None:
    """Print a line, once for all ranks."""
    if global_rank() == 0:
        print(line, flush=True)
