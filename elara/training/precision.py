"""What `trainer.precision=auto` means on this machine."""

from __future__ import annotations

import time

import torch

from elara.launch import is_rank
from elara.model.linear import linear
from elara.training.muon import fast_dtype

WORTH = 1.5  # bf16 must be that much faster than fp32 in a matmul before its casts pay off in a whole step


def resolve(precision: str | int, accelerator: str = "cpu") -> str:
    """A precision that lightning.Trainer knows.

    `auto` is bf16-mixed on a GPU that computes in bf16 and on a CPU whose bf16 matmul is clearly faster than fp32
    (measured, about 20 ms), else 32-true. Ranks must not disagree: they ask whether the CPU knows bf16 instead of
    measuring. Everything else is returned as it is.
    """
    text = str(precision)
    if text != "auto":
        return text
    on_gpu = accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    if on_gpu:
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator not in ("cpu", "auto", "gpu", "cuda"):
        return "32-true"
    worth = fast_dtype(torch.device("cpu")) == torch.bfloat16 if is_rank() else bf16_speed() > WORTH
    return "bf16-mixed" if worth else "32-true"


def bf16_speed(size: int = 384, repeats: int = 5) -> float:
    """How many times faster a bf16 matmul of `size`^3 is than an fp32 one on this CPU; best of `repeats` each."""
    x, w = torch.ones(size, size), torch.ones(size, size)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), w.to(dtype)
        times = []
        for _ in range(repeats + 1):  # the first one warms the kernel cache
            begin = time.perf_counter()
            linear(a, b)
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times[1:])
    return seconds[torch.float32] / seconds[torch.bfloat16]
