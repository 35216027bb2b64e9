"""How decoding runs a model: without gradients and dropout, with a cache in the dtype that it computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from elara.model import ElaraLM

PREFILL = 512  # prompt tokens read per forward: bounds the memory of attention, whatever the prompt's length


@contextmanager
def inference(model: ElaraLM) -> Iterator[None]:
    """Inference mode and no dropout; the model's mode comes back afterwards."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def cache_dtype(weight: Tensor) -> torch.dtype:
    """What keys and values are kept in: autocast's dtype, else the weights'."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
