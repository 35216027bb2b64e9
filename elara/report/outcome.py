"""What came out of one run, finished or not, alone or as a job of a sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elara.errors import ElaraError
from elara.overrides import key_of
from elara.report.metrics import Columns, points, read_metrics
from elara.runs import Run

State = Literal["finished", "pruned", "failed", "unfinished", "missing"]
NO_SETTING = ("hydra", "resume", "sweep", "launcher")  # overrides that say where and how, not what, is trained


@dataclass(frozen=True)
class Outcome:
    """A run as its folder tells it. Figures are None where it has none.

    pruned: a search gave it up. unfinished: it still trains, or was ended without a word. missing: a job that was
    planned and never began.
    """

    run: Run
    overrides: dict[str, str]  # value by key, quotes undone, in the order given
    state: State
    error: str | None  # of a failed one, one line
    summary: dict[str, Any]
    columns: Columns  # train/ and val/ of metrics.csv; empty where there is no row
    job_seconds: float | None = None  # how long its process took

    @property
    def name(self) -> str:
        """The folder's name: in a sweep the job's number."""
        return self.run.path.name

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        logged = int(self.columns["step"][-1]) if len(self.columns.get("step", ())) else 0
        return max(logged, int(self.summary.get("steps", 0)))

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the lowest held-out loss of the autoregressive head, in nats per token."""
        steps, losses = points(self.columns, "val/loss_ar")
        if len(losses):
            i = int(np.argmin(losses))
            return int(steps[i]), float(losses[i])
        loss = self.summary.get("metrics", {}).get("val/loss_ar")  # a run that logs to other places than the csv
        return None if loss is None else (self.step, float(loss))

    @property
    def best_loss(self) -> float | None:
        return self.best[1] if self.best else None

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        values = points(self.columns, name)[1]
        return float(values[-1]) if len(values) else self.summary.get("metrics", {}).get(name)

    def at_best(self, name: str) -> float | None:
        """A metric at the validation of the lowest loss, else its newest value."""
        if self.best and name in self.columns:
            found = self.columns[name][self.columns["step"] == self.best[0]]
            if len(found) and math.isfinite(found[0]):
                return float(found[0])
        return self.last(name)

    def median(self, name: str) -> float | None:
        values = points(self.columns, name)[1]
        return float(np.median(values)) if len(values) else None

    @property
    def parameters(self) -> int | None:
        return self.summary.get("parameters")

    @property
    def wall_seconds(self) -> float | None:
        """Training with validation; of a run that left no summary, its process from start to end."""
        wall: float | None = self.summary.get("wall_seconds") if self.summary.get("finished") else None
        return self.job_seconds if wall is None else wall


def read_outcome(run: Run, planned: list[str] | None = None) -> Outcome:
    """Read a run folder, whatever is there of it. planned: its overrides where the folder itself does not tell."""
    job, summary = run.read_job(), run.read_summary()
    overrides = [str(text) for text in job.get("overrides", ())] or run.read_overrides() or planned or []
    try:
        columns = read_metrics(run.metrics, lambda name: name.startswith(("train/", "val/")))
    except ElaraError:
        columns = {}
    state = _state(run, job, summary)
    error = _error(run, job) if state == "failed" else None
    return Outcome(run, settings(overrides), state, error, summary, columns, job.get("seconds"))


def settings(overrides: list[str]) -> dict[str, str]:
    """Overrides as value by key; those that only say where or how it is run are left out."""
    found = {}
    for text in overrides:
        key = key_of(text)
        if key.partition(".")[0] in NO_SETTING:
            continue
        if text.startswith("~"):
            found[f"~{key}"] = "removed"
        else:
            found[key] = _bare(text.partition("=")[2])
    return found


def _bare(value: str) -> str:
    """A value without the quotes that only Hydra's grammar needs."""
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _state(run: Run, job: dict[str, Any], summary: dict[str, Any]) -> State:
    code = job.get("exit_code")
    if run.over:
        return "finished"
    if job.get("pruned_at") is not None:
        return "pruned"
    if code is not None:
        return "failed"
    return "unfinished" if run.config.exists() or run.metrics.exists() or run.job_log.exists() else "missing"


def _error(run: Run, job: dict[str, Any]) -> str:
    said = job.get("error") or next(iter(reversed(log_tail(run.job_log, 1))), "")
    return " ".join(str(said).split()) or f"exit code {job.get('exit_code')}"


def log_tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log that say something; [] where there is none."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
