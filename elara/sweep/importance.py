"""Which of the searched keys mattered, and how sure that is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from elara.sweep.records import Record, projected
from elara.sweep.space import Parameter

LEAST = 10  # trials; measured on synthetic searches: with fewer the order of the keys is chance
RESAMPLES = 16  # sets of trials, drawn with replacement, that the range comes from


@dataclass(frozen=True)
class Importance:
    """Share of the metric's spread that one key explains alone; low, high: the middle 80 % over resampled trials."""

    key: str
    share: float
    low: float
    high: float


def importances(records: Sequence[Record], space: Sequence[Parameter]) -> list[Importance] | None:
    """fANOVA (Hutter et al., 2014), the largest share first; None when the trials are too few or all equal.

    Pruned trials count with their projected value: without them the keys that got trials pruned would seem harmless.
    """
    ends = projected(records)
    trials = [(record.values, ends[record.number]) for record in records if record.number in ends]
    if len(trials) < LEAST or len(set(ends.values())) < 2:
        return None
    whole = _shares(trials, space)
    generator = np.random.default_rng(0)
    drawn = [_shares([trials[i] for i in generator.integers(len(trials), size=len(trials))], space, trees=24)
             for _ in range(RESAMPLES)]  # fmt: skip
    found = []
    for parameter in space:
        low, high = np.quantile([shares.get(parameter.key, 0.0) for shares in drawn], [0.1, 0.9])
        found.append(Importance(parameter.key, float(whole.get(parameter.key, 0.0)), float(low), float(high)))
    return sorted(found, key=lambda importance: -importance.share)


def _shares(
    trials: Sequence[tuple[dict[str, Any], float]], space: Sequence[Parameter], trees: int = 64
) -> dict[str, float]:
    if len({value for _, value in trials}) < 2:
        return {}
    study = optuna.create_study()
    distributions = {parameter.key: _distribution(parameter) for parameter in space}
    for values, value in trials:
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=trees, seed=0))


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.choices)
    if parameter.kind == "int":
        step = int(parameter.step or 1)
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
