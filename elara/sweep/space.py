"""What is searched: the section `space` of the configuration as parameters, and a sampled value as an override."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elara.cli import nearest
from elara.errors import ElaraError
from elara.sweep.overrides import value_text

if TYPE_CHECKING:
    from optuna.trial import Trial

KEYS = {
    "float": ("low", "high", "log", "step"),
    "int": ("low", "high", "log", "step"),
    "choice": ("choices",),
}


@dataclass(frozen=True)
class Parameter:
    """One override key and the values it may take. Checked when made: ElaraError names what is wrong."""

    key: str  # as elara.train takes it: optimizer.lr, moe
    kind: str  # float, int or choice
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # sample the logarithm evenly: for rates that span orders of magnitude
    step: float | None = None  # distance of neighbouring values; None = any float, every int
    choices: tuple[str, ...] = ()  # the values as override texts, in their order

    def __post_init__(self) -> None:
        if self.kind == "choice":
            if len(set(self.choices)) < 2:
                raise ElaraError(f"space.{self.key}.choices={list(self.choices)} needs at least two different values")
            return
        if not self.low < self.high:
            raise ElaraError(f"space.{self.key}: low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ElaraError(f"space.{self.key}: log=true needs a positive low, not low={self.low:g}")
        if self.step is None:
            return
        if self.step <= 0 or self.log:
            what = "does not go with log=true" if self.log else "must be positive"
            raise ElaraError(f"space.{self.key}: step={self.step:g} {what}")
        count = (self.high - self.low) / self.step
        if not math.isclose(count, round(count), rel_tol=1e-6):
            raise ElaraError(f"space.{self.key}: steps of {self.step:g} from low={self.low:g} miss high={self.high:g}")

    def sample(self, trial: Trial) -> str:
        """Let Optuna choose, and return the value as an override text."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.choices)
        if self.kind == "int":
            step = int(self.step or 1)
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), step=step, log=self.log))
        return self.text(trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log))

    def text(self, value: Any) -> str:
        """A value of this parameter as an override text: floats by four digits, which no loss can tell apart."""
        if self.kind == "choice":
            return str(value)
        if self.kind == "int":
            return str(int(value))
        short = format(value, ".4g" if self.step is None else ".10g")
        return short if self.low <= float(short) <= self.high else repr(float(value))

    def ends(self) -> tuple[str, str]:
        """The first and the last value."""
        if self.kind == "choice":
            return self.choices[0], self.choices[-1]
        return self.text(self.low), self.text(self.high)


def read_space(section: Mapping[str, Any]) -> list[Parameter]:
    """Parameters of a `space` section; a key may be nested or dotted: `optimizer: {lr: ...}` or `optimizer.lr: ...`."""
    space = [_parameter(key, dict(values)) for key, values in _leaves(section, "")]
    if not space:
        raise ElaraError("space is empty, so there is nothing to search: take an option such as search=lr")
    keys = [parameter.key for parameter in space]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ElaraError(f"space.{twice} is given twice, nested and with dots")
    return space


def _leaves(section: Mapping[str, Any], prefix: str) -> list[tuple[str, Mapping[str, Any]]]:
    found = []
    for key, values in section.items():
        place = f"{prefix}{key}"
        if not isinstance(values, Mapping):
            raise ElaraError(f"space.{place}={values} must be a mapping as {{type: float, low: 0.1, high: 1}}")
        if isinstance(values.get("type"), str):
            found.append((place, values))
        elif prefix_only := [name for name in values if name in KEYS["float"] + KEYS["choice"]]:
            raise ElaraError(f"space.{place} has {prefix_only[0]} but no type: give one of {', '.join(KEYS)}")
        else:
            found += _leaves(values, f"{place}.")
    return found


def _parameter(key: str, values: dict[str, Any]) -> Parameter:
    kind = values.pop("type")
    if kind not in KEYS:
        raise ElaraError(f"space.{key}.type={kind} must be one of: {', '.join(KEYS)}")
    for name in values:
        if name not in KEYS[kind]:
            close = nearest(name, KEYS[kind], f"space.{key}.")
            raise ElaraError(f"unknown key 'space.{key}.{name}'{close}; of type {kind} are: {', '.join(KEYS[kind])}")
    if kind == "choice":
        choices = values.get("choices")
        if not isinstance(choices, list):
            raise ElaraError(f"space.{key}.choices={choices} must be a list of values")
        return Parameter(key, kind, choices=tuple(map(value_text, choices)))
    numbers = {name: values.get(name) for name in ("low", "high", "step")}
    allowed = int if kind == "int" else (int, float)
    for name, value in numbers.items():
        if value is None and name != "step":
            raise ElaraError(f"space.{key}.{name} has no value: give one")
        if value is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
            raise ElaraError(f"space.{key}.{name}={value} must be a {'whole ' if kind == 'int' else ''}number")
    if not isinstance(log := values.get("log") or False, bool):
        raise ElaraError(f"space.{key}.log={log} must be true or false")
    return Parameter(key, kind, log=log, **numbers)  # type: ignore[arg-type]
