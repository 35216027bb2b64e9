"""What TensorBoard and Weights & Biases show beside curves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from numpy.typing import NDArray


class Monitor(Logger):
    """A logger that takes more than figures. The first rank calls it; other ranks' calls do nothing.

    resumed_step: step of the checkpoint that training went on from, set before the first figure; what was logged
    behind it, by the process that died, comes again.
    more_follows: a validation is made up for, training comes behind it: `finalize` must not end anything.
    exit_code: how training ends, set before `finalize` where that is not a plain success or failure.
    checkpoints: which of them `log_checkpoint` is to be called with: none, best (when training ends) or all.
    """

    resumed_step = 0
    more_follows = False
    exit_code = 0
    checkpoints = "none"

    @property
    def hint(self) -> str:
        """One line for the user on how to look at what was logged."""
        return ""

    @abstractmethod
    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """What is known about the run beside its configuration, as nested plain values."""

    @abstractmethod
    def log_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """pixels: (height, width, 3)."""

    @abstractmethod
    def log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        """samples: what the model wrote, as (prompt, continuation)."""

    def log_best(self, figures: Mapping[str, float]) -> None:
        """The lowest values of a run over all the processes that it took."""

    def log_checkpoint(self, folder: Path, aliases: Sequence[str]) -> None:
        """Keep the weights of a checkpoint folder, without the trainer's state, under these names."""
