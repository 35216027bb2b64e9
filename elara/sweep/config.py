"""The schema of `conf/sweep.yaml`, and what of it can be checked before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from elara.cli import nearest
from elara.errors import ElaraError

SAMPLERS = ("tpe", "cmaes", "random")
PRUNERS = ("median", "hyperband", "none")
DIRECTIONS = ("minimize", "maximize")
METRICS = ("val/loss", "val/loss_ar", "val/loss_diffusion", "val/perplexity", "val/bits_per_char",
           "val/tokens_per_forward", "train/loss", "train/loss_ar", "train/loss_diffusion",
           "train/tokens_per_second", "train/seconds_per_step")  # fmt: skip
METRIC_FAMILIES = r"val/accept/\d+|moe/layer\d+/pass\d+/(clean|mask)/\w+"


@dataclass
class SamplerConfig:
    """How the next trial's values are chosen."""

    name: str = "tpe"
    startup: int = 8


@dataclass
class PrunerConfig:
    """When a trial is given up before its last step."""

    name: str = "median"
    startup: int = 4
    warmup: int = 0
    reduction: int = 3


@dataclass
class SearchConfig:
    """Everything `python -m elara.sweep` can be told; each key is explained in conf/sweep.yaml."""

    study: str = "search"
    metric: str = "val/loss_ar"
    direction: str = "minimize"
    trials: int = 20
    jobs: int = 1
    gpus: list[int] = field(default_factory=list)
    timeout: float | None = None
    seed: int = 1
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    trial_callbacks: str | None = "search"
    base: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    space: dict[str, Any] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)

    def callbacks(self) -> list[str]:
        """The override that chooses the trials' callbacks, if any."""
        return [f"callbacks={self.trial_callbacks}"] if self.trial_callbacks else []


def check(wanted: SearchConfig) -> None:
    """Raise ElaraError for the first value that cannot be meant."""
    if not re.fullmatch(r"[\w.-]+", wanted.study):
        raise ElaraError(f"study={wanted.study} names a folder: use letters, digits, '.', '-' and '_' only")
    if wanted.metric not in METRICS and not re.fullmatch(METRIC_FAMILIES, wanted.metric):
        close = nearest(wanted.metric, METRICS)
        raise ElaraError(f"metric={wanted.metric} is no column of metrics.csv{close}; known: {', '.join(METRICS)}")
    for key, value, known in (
        ("direction", wanted.direction, DIRECTIONS),
        ("sampler.name", wanted.sampler.name, SAMPLERS),
        ("pruner.name", wanted.pruner.name, PRUNERS),
    ):
        if value == "grid" and key == "sampler.name":
            raise ElaraError("sampler.name=grid: a grid is `python -m elara.train -m key=1,2,3`")
        if value not in known:
            raise ElaraError(f"{key}={value} must be one of: {', '.join(known)}")
    for key, count, least in (
        ("trials", wanted.trials, 1),
        ("jobs", wanted.jobs, 1),
        ("sampler.startup", wanted.sampler.startup, 1),
        ("pruner.startup", wanted.pruner.startup, 1),
        ("pruner.warmup", wanted.pruner.warmup, 0),
        ("pruner.reduction", wanted.pruner.reduction, 2),
    ):
        if count < least:
            raise ElaraError(f"{key}={count} must be at least {least}")
    if wanted.timeout is not None and wanted.timeout <= 0:
        raise ElaraError(f"timeout={wanted.timeout:g} must be a positive number of minutes, or null")
