"""Which numbers the keys of the configuration may have: the one place where their ranges stand.

Outside of them training turns around, divides by zero or means nothing. What depends on several keys, or on what they
meet, is checked where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from elara.errors import ElaraError

# In the notation of intervals, "whole" for whole numbers where no schema says so; of a list every number is meant, and
# null is nobody's concern here
RANGES = {
    "model.dropout": "[0, 1)",
    "model.init_std": "[0, inf)",
    "model.norm_eps": "(0, inf)",
    "model.rope_base": "(0, inf)",
    "moe.balance_loss": "[0, inf)",
    "moe.bias_update_rate": "[0, inf)",
    "moe.gate_scale": "(0, inf)",
    "moe.z_loss": "[0, inf)",
    "tidar.block_fraction": "(0, 1]",
    "tidar.loss_weight": "[0, inf)",
    "optimizer.adam_lr": "[0, inf)",
    "optimizer.betas": "[0, 1)",
    "optimizer.eps": "[0, inf)",
    "optimizer.lr": "[0, inf)",
    "optimizer.momentum": "[0, 1)",
    "optimizer.weight_decay": "[0, inf)",
    "schedule.decay": "[0, 1]",
    "schedule.final": "[0, 1]",
    "schedule.warmup": "whole [0, inf)",
    "trainer.accumulate_grad_batches": "whole [1, inf)",
    "trainer.gradient_clip_val": "[0, inf)",  # 0 and null: no clipping
    "trainer.log_every_n_steps": "whole [1, inf)",
    "trainer.max_steps": "whole [1, inf)",
    "trainer.val_check_interval": "whole [1, inf)",
    "distill.context": "[8, inf)",
    "distill.on_policy": "[0, 1]",
    "distill.temperature": "(0, inf)",
    "distill.top_k": "[1, inf)",
    "distill.weight": "[0, 1]",
    "data.batch_size": "[1, inf)",
    "data.honeycomb.min_rating": "[0, 1]",
    "data.honeycomb.rag.dropout": "[0, 1]",
    "data.max_documents": "[1, inf)",
    "data.processes": "[1, inf)",
    "data.replay.share": "[0, 1)",
    "data.seq": "[1, inf)",
    "data.val_batches": "[1, inf)",
    "data.val_fraction": "[0, 1]",
    "data.workers": "[0, inf)",
    "callbacks.acceptance.new_tokens": "whole [1, inf)",
    "callbacks.acceptance.prompt_tokens": "whole [1, inf)",
    "callbacks.acceptance.prompts": "whole [1, inf)",
    "callbacks.acceptance.temperature": "[0, inf)",
    "callbacks.checkpoint.every_n_steps": "whole [1, inf)",
    "callbacks.checkpoint.keep": "whole [1, inf)",
    "callbacks.monitoring.share": "[0, 1]",
    "callbacks.progress.every": "[0, inf)",
    "callbacks.samples.every": "whole [1, inf)",
}


def check_ranges(settings: Mapping[str, Any]) -> None:
    """Raise ElaraError for the first number of nested settings that is not finite, or lies outside of its range."""
    for key, value in _numbers(settings, ""):
        if not math.isfinite(value):
            raise ElaraError(f"{key}={value} is no number to compute with: give a finite one")
        if key in RANGES and (wanted := _outside(value, RANGES[key])):
            raise ElaraError(f"{key}={value} must be {wanted}")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every number in nested settings, with its dotted key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _outside(value: float, interval: str) -> str:
    """The interval in words where a value lies outside of it, else ""."""
    whole, interval = interval.startswith("whole "), interval.removeprefix("whole ")
    low, high = (float(bound) for bound in interval[1:-1].split(", "))
    closed = interval[0] == "[", interval[-1] == "]"
    inside = (value > low or (value == low and closed[0])) and (value < high or (value == high and closed[1]))
    if inside and (isinstance(value, int) or not whole):
        return ""

    if all(closed):
        return f"between {low:g} and {high:g}"
    bounds = [f"{'at least' if closed[0] else 'above'} {low:g}"]
    bounds += [f"{'at most' if closed[1] else 'below'} {high:g}"] * math.isfinite(high)
    return "a whole number of " * whole + " and ".join(bounds)
