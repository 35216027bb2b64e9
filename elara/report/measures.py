"""The figures that tables show of a run, and how values are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from elara.report.comparison import Comparison, Group, Spread
from elara.report.outcome import Outcome


@dataclass(frozen=True)
class Measure:
    """One column: `value` of a run, None where it has none, and how a number of it is shown."""

    name: str  # in summary.csv
    title: str
    value: Callable[[Outcome], float | None]
    form: Callable[[float], str]

    def show(self, outcome: Outcome) -> str:
        value = self.value(outcome)
        return "" if value is None else self.form(value)

    def show_spread(self, spread: Spread | None) -> str:
        if spread is None:
            return ""
        shown = self.form(spread.mean)
        return f"{shown} ± {self.form(spread.deviation)}" if spread.deviation > 0 else shown


MEASURES = (
    Measure("val_loss_best", "best loss", lambda run: run.best_loss, "{:.4f}".format),
    Measure("best_step", "at step", lambda run: run.best[0] if run.best else None, "{:,.0f}".format),
    Measure("val_loss_last", "last loss", lambda run: run.last("val/loss_ar"), "{:.4f}".format),
    Measure("bits_per_char", "bits/char", lambda run: run.at_best("val/bits_per_char"), "{:.4f}".format),
    Measure("tokens_per_forward", "tokens/forward", lambda run: run.at_best("val/tokens_per_forward"),
            "{:.2f}".format),
    Measure("seconds_per_step", "s/step", lambda run: run.median("train/seconds_per_step"), "{:.3g}".format),
    Measure("parameters", "parameters", lambda run: run.parameters, lambda count: amount(count)),
    Measure("wall_seconds", "wall time", lambda run: run.wall_seconds, lambda seconds: clock(seconds)),
)  # fmt: skip
OF_GROUPS = tuple(measure for measure in MEASURES if measure.name not in ("best_step", "wall_seconds"))


def measured(comparison: Comparison) -> list[Measure]:
    """The measures that at least one job has."""
    return [m for m in MEASURES if any(m.value(job) is not None for job in comparison.jobs)]


def measured_of_groups(comparison: Comparison) -> list[Measure]:
    return [m for m in OF_GROUPS if m in measured(comparison)]


def label(comparison: Comparison, group: Group) -> str:
    """What sets a group apart, as `lr=0.01 moe=none`."""
    names = short_keys(comparison.group_keys)
    return " ".join(f"{names[k]}={tidy(v)}" for k, v in zip(comparison.group_keys, group.values, strict=True) if v)


def short_keys(keys: list[str]) -> dict[str, str]:
    """Every key's last part, where no other key ends alike: `lr` of `optimizer.lr`."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def tidy(value: str) -> str:
    """A value for people: numbers by four digits."""
    number = as_number(value)
    if number is None or len(value) <= 6:
        return value
    return f"{number:.4g}"


def as_number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def amount(count: float) -> str:
    """`3.14 M` of 3,141,592."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def clock(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
