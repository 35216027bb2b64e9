"""Fully sharded data parallel training, set up so that it computes what one process would."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import MixedPrecision

from elara.model.lm import Block


def fsdp(**options: Any) -> FSDPStrategy:
    """FSDP with every block a unit of its own; `options` go to Lightning's FSDPStrategy.

    Weights are gathered in float32 and autocast decides what runs in bf16: the router stays in float32, which FSDP's
    own mixed precision would not allow. Checkpoints hold the full state, so they load without FSDP.
    """
    defaults: dict[str, Any] = {
        "auto_wrap_policy": {Block},
        "mixed_precision": MixedPrecision(),
        "state_dict_type": "full",
    }
    return FSDPStrategy(**{**defaults, **options})
