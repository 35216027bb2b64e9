"""The runs of a sweep or search beside each other: in what they differ, and what came out of each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from elara.errors import ElaraError
from elara.plan import MULTIRUN, is_sweep, read_plan
from elara.report.outcome import Outcome, State, read_outcome
from elara.runs import Run

SEED = "seed"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds; deviation: sample standard deviation, nan of one run."""

    mean: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Group:
    """Finished runs that differ by their seed only; a run alone where seeds are not compared."""

    values: tuple[str, ...]  # of Comparison.group_keys; "" where a run leaves a key at its default
    jobs: tuple[Outcome, ...]

    def spread(self, value: Callable[[Outcome], float | None]) -> Spread | None:
        """Mean and deviation of a figure, None where a run has none."""
        found = [value(job) for job in self.jobs]
        known = [number for number in found if number is not None and math.isfinite(number)]
        if not known or len(known) < len(found):
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else math.nan
        return Spread(statistics.fmean(known), deviation, len(known))

    @cached_property
    def loss(self) -> Spread | None:
        """The lowest held-out loss."""
        return self.spread(lambda job: job.best_loss)


@dataclass(frozen=True)
class Comparison:
    """All jobs in their order."""

    folder: Path
    jobs: tuple[Outcome, ...]

    @property
    def title(self) -> str:
        return title_of(self.folder)

    @cached_property
    def _keys(self) -> list[str]:
        return list(dict.fromkeys(key for job in self.jobs for key in job.overrides))

    @cached_property
    def keys(self) -> list[str]:
        """Override keys that are not the same in all jobs, in the order given."""
        return [key for key in self._keys if len({job.overrides.get(key) for job in self.jobs}) > 1]

    @cached_property
    def common(self) -> dict[str, str]:
        """Overrides that are the same in all jobs."""
        return {key: self.jobs[0].overrides[key] for key in self._keys if key not in self.keys}

    @cached_property
    def seeds(self) -> bool:
        """Whether runs are repeated with several seeds, so that means over them tell something."""
        others = [self._values(job, [key for key in self.keys if key != SEED]) for job in self.jobs]
        return SEED in self.keys and len(set(others)) < len(others)

    @property
    def group_keys(self) -> list[str]:
        """The keys that tell groups apart."""
        return [key for key in self.keys if not (self.seeds and key == SEED)]

    @cached_property
    def groups(self) -> list[Group]:
        """The finished runs, best first."""
        members: dict[tuple[str, ...], list[Outcome]] = {}
        for job in self.finished:
            members.setdefault(self._values(job, self.group_keys), []).append(job)
        if not self.seeds:  # a job that was given twice stays two
            groups = [Group(values, (job,)) for values, jobs in members.items() for job in jobs]
        else:
            groups = [Group(values, tuple(jobs)) for values, jobs in members.items()]
        return sorted(groups, key=lambda group: group.loss.mean if group.loss else math.inf)

    @property
    def finished(self) -> list[Outcome]:
        return [job for job in self.jobs if job.state == "finished"]

    @property
    def failed(self) -> list[Outcome]:
        """Every job that should have come to its end and did not, those that never began included."""
        return [job for job in self.jobs if job.state not in ("finished", "pruned")]

    @property
    def ranked(self) -> list[Outcome]:
        """Finished jobs by their held-out loss, best first; behind them the others."""
        states = get_args(State)
        return sorted(self.jobs, key=lambda job: (states.index(job.state), job.best[1] if job.best else math.inf))

    def asked(self, group: Group) -> int:
        """How many jobs a group would have if all were finished."""
        return sum(self._values(job, self.group_keys) == group.values for job in self.jobs)

    @staticmethod
    def _values(job: Outcome, keys: list[str]) -> tuple[str, ...]:
        return tuple(job.overrides.get(key, "") for key in keys)


def title_of(folder: Path) -> str:
    """What a folder is called: `<name>/<time>` of a run or sweep, `<study>` of a search, `..., job 3` inside one."""
    folder = folder.resolve()
    if folder.name.isdecimal() and (Run(folder).job.exists() or is_sweep(folder.parent)):
        return f"{title_of(folder.parent)}, job {folder.name}"
    return folder.name if folder.parent.name in ("searches", "") else f"{folder.parent.name}/{folder.name}"


def is_comparison(folder: Path) -> bool:
    """Whether a folder is that of a sweep or search: it was planned as one, or numbered jobs lie in it."""
    return is_sweep(folder) or bool(_numbered(folder))


def compare(folder: Path) -> Comparison:
    """Read all jobs of a sweep or search. Raises ElaraError when there are none."""
    plan, found = planned(folder), _numbered(folder)
    numbers = sorted(set(found) | set(range(len(plan))))
    if not numbers:
        raise ElaraError(f"{folder} is no sweep: there is no {MULTIRUN} and no numbered run folder in it")
    places = {n: Run(found.get(n, folder / str(n))) for n in numbers}
    jobs = [read_outcome(run, plan[n] if n < len(plan) else None) for n, run in places.items()]
    return Comparison(folder, tuple(jobs))


def planned(folder: Path) -> list[list[str]]:
    """The overrides of every job of a sweep, in order; [] where the folder is none."""
    try:
        return read_plan(folder).jobs
    except ElaraError:
        return []


def _numbered(folder: Path) -> dict[int, Path]:
    try:
        return {int(path.name): path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()}
    except OSError:
        return {}
