"""Whether `elara.train` takes what a search would give it: found out before the first trial, without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from elara.effect import find_idle, value_at
from elara.errors import ElaraError
from elara.overrides import key_of
from elara.sweep.overrides import merged
from elara.sweep.space import Parameter

RESERVED = ("hydra", "resume", "sweep")


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a trial, the longest where they are searched; None where the configuration does not say."""

    last: int | None
    validation: int | None  # steps from one validation to the next
    rising: int | None = None  # steps in which the learning rate still rises

    @property
    def looks(self) -> int | None:
        """How often a trial can be judged before it ends."""
        return None if self.last is None or self.validation is None else (self.last - 1) // self.validation

    def first_look(self, warmup: int) -> int | None:
        """The step of the first validation at `warmup` or behind it."""
        return None if self.validation is None else max(1, -(-warmup // self.validation)) * self.validation


def compose(fixed: Sequence[str], space: Sequence[Parameter]) -> Steps:
    """Compose the configuration of trials at the corners of the space; raises ElaraError where one cannot be.

    Two corners, the lowest and the highest values, and each further option of a group.
    """
    searched = {parameter.key for parameter in space}
    for override in fixed:
        key = key_of(override)
        if key.partition(".")[0] in RESERVED:
            raise ElaraError(f"{override} is not for the trials of a search: leave it out of the overrides")
        if key in searched:
            raise ElaraError(f"{override} is fixed, but {key} is searched: leave it out, or give ~space.{key}")
    low, high = ({p.key: p.ends()[end] for p in space} for end in (0, 1))
    corners = [low, high]
    for parameter in space:
        if parameter.kind == "choice" and "." not in parameter.key:
            corners += [low | {parameter.key: choice} for choice in parameter.choices[1:-1]]
    configs = [_compose(merged(fixed, (f"{key}={text}" for key, text in corner.items()))) for corner in corners]
    _check_effect(fixed, searched, configs)
    for config in configs:
        if not any(str(part.get("_target_", "")).endswith((".CSV", ".csv")) for part in _parts(config, "logger")):
            raise ElaraError("a search reads metrics.csv, which the trials' logger does not write: take logger=csv")
        if not any(str(part.get("_target_", "")).endswith(".Metrics") for part in _parts(config, "callbacks")):
            raise ElaraError("a search needs the callback `metrics` in its trials: take trial_callbacks=search")
    return Steps(
        _largest(configs, "trainer", "max_steps"),
        _largest(configs, "trainer", "val_check_interval"),
        _largest(configs, "schedule", "warmup"),
    )


def _check_effect(fixed: Sequence[str], searched: set[str], configs: Sequence[dict[str, Any]]) -> None:
    """Raise ElaraError for what is fixed or searched and has no effect in any trial."""
    every = [*fixed, *(f"{key}=..." for key in sorted(searched))]
    idle = [one for one in find_idle(configs[0], every, "train") if not searched & set(one.rule.decided_by)]
    if idle and (key := key_of(idle[0].override)) not in searched:
        before = _compose([text for text in fixed if key_of(text) != key])
        idle = [one for one in idle if value_at(configs[0], key) not in (None, value_at(before, key))]
    if idle:
        raise ElaraError(str(idle[0]))


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "elara.train", *overrides, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        line = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
        raise ElaraError(f"elara.train does not take what the search would give it: {line}")
    config: dict[str, Any] = yaml.safe_load(done.stdout)
    return config


def _parts(config: dict[str, Any], group: str) -> list[dict[str, Any]]:
    return [part for part in (config.get(group) or {}).values() if isinstance(part, dict)]


def _largest(configs: Sequence[dict[str, Any]], group: str, key: str) -> int | None:
    values = [config[group].get(key) for config in configs]
    return max(values) if all(isinstance(value, int) for value in values) else None
