"""Learning-rate schedules: `schedule(total_steps)` gives the factor on the base rate as a function of the step.

Steps count from 0, so that the last one is `total_steps - 1`; it takes the schedule's `final` factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from elara.ranges import check_ranges

Factor = Callable[[int], float]


def cosine(total_steps: int, *, warmup: int, final: float) -> Factor:
    """Linear warm-up over `warmup` steps, then half a cosine down to `final` of the base rate at the last step."""
    check_ranges({"trainer.max_steps": total_steps, "schedule": {"warmup": warmup, "final": final}})

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step + 1 - warmup) / (total_steps - warmup)) if step < total_steps else 1.0
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def wsd(total_steps: int, *, warmup: int, decay: float, final: float) -> Factor:
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): linear to `final` over the last `decay` share of steps.

    The last step takes `final`; with a `decay` of 0 none does.
    """
    check_ranges({"trainer.max_steps": total_steps, "schedule": {"warmup": warmup, "decay": decay, "final": final}})
    begin = total_steps * (1 - decay)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = min(1.0, max(0.0, (step + 1 - begin) / (total_steps - begin))) if decay else 0.0
        return rise * (1 - (1 - final) * fall)

    return factor
