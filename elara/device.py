"""The torch device that a configuration names, and what it is called."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from elara.errors import ElaraError
from elara.launch import cores


def find_device(name: str) -> torch.device:
    """`auto` is cuda when there is one, else the CPU; ElaraError when the device cannot be used here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ElaraError(f"device={name} cannot be used here ({reason}): use cpu or auto") from error


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on `device`, without making the host wait for the work that is queued there."""
    if device.type != "cuda" or x.is_cuda or not torch.cuda.is_available():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


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


def processes(trainer: Mapping[str, Any]) -> int:
    """How many processes of this machine the settings of a lightning.Trainer ask for, one per device.

    Raises ElaraError when there are fewer devices, or nothing says how several share the work. CPU ranks share the
    cores: two may share one, more would only wait.
    """
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if on_gpu and not torch.cuda.is_available():
        raise ElaraError(
            f"trainer.accelerator={accelerator}, but torch finds no GPU here: take trainer=cpu, or trainer=ddp_cpu"
        )
    here = torch.cuda.device_count() if on_gpu else max(2, cores())
    if devices in ("auto", -1, "-1"):
        wanted = here if on_gpu else 1
    elif not isinstance(devices, (int, str)):
        wanted = len(devices)
    elif str(devices).isdigit() and int(devices) > 0:
        wanted = int(devices)
    else:
        raise ElaraError(f"trainer.devices={devices} must be a whole number of at least 1, a list of devices, or auto")
    if wanted > here:
        what = f"{here} GPU{'s' if here > 1 else ''}" if on_gpu else f"{cores()} cores"
        raise ElaraError(f"trainer.devices={wanted}, but this machine has {what}: give at most {here}")
    if wanted > 1 and trainer.get("strategy", "auto") == "auto":
        raise ElaraError(f"trainer.devices={wanted} needs a way to share the work: take trainer=ddp or ddp_cpu")
    return wanted
