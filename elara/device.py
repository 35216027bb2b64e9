"""The torch device that a configuration names, and what it is called."""

from __future__ import annotations

import platform
from pathlib import Path

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


def device_name(device: torch.device | str = "cpu") -> str:
    """The name of the GPU or of the processor."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
