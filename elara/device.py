"""The torch device that a configuration names."""

from __future__ import annotations

import torch

from elara.errors import ElaraError


def find_device(name: str) -> torch.device:
    """`auto` is cuda when there is one, else the CPU; ElaraError when the device cannot be used here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ElaraError(f"device={name} cannot be used here ({reason}): use cpu or auto") from error
