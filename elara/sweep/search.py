"""The search itself: start trials, watch their losses, end the hopeless ones, until the study has its number."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from optuna.trial import Trial

from elara.launch import cores, signals
from elara.runs import Run
from elara.sweep.config import SearchConfig
from elara.sweep.curve import Curve
from elara.sweep.overrides import merged
from elara.sweep.process import GRACE, TrialProcess
from elara.sweep.records import best, duration
from elara.sweep.study import SharedStudy

POLL = 0.5  # seconds between looks at the running trials
SAME_AT_FIRST = 3  # failures for the same reason, before anything went well, that end the search
IN_A_ROW = 10  # failures for whatever reason, one after another, that end it
INTERRUPTED, TIME_IS_UP = "interrupted", "time is up"


@dataclass
class Running:
    """A trial of this process."""

    trial: Trial
    process: TrialProcess
    curve: Curve
    slot: int  # which of the `jobs` places it takes
    pruned_at: int | None = None  # step at which it was given up
    broken: str | None = None  # why it is being ended, if it is at fault


@dataclass
class Search:
    """One process's share of a study."""

    wanted: SearchConfig
    fixed: Sequence[str]
    study: SharedStudy
    folder: Path
    running: list[Running] = field(default_factory=list)
    stopping: str | None = None  # why no further trial is started: INTERRUPTED, TIME_IS_UP or what went wrong
    signals: int = 0  # that came to this process
    _failures: list[str] = field(default_factory=list)  # since something went well
    _look: bool = True  # whether there may be room for another trial

    def run(self) -> None:
        """Run trials until the study is complete, the time is up, a signal comes or too much goes wrong."""
        deadline = time.monotonic() + 60 * (self.wanted.timeout or math.inf)
        with self._signals():
            try:
                while True:
                    for running in list(self.running):
                        self._watch(running)
                    if self.signals:
                        self._stop(INTERRUPTED, GRACE if self.signals == 1 else 0)
                    elif time.monotonic() > deadline:
                        self._stop(TIME_IS_UP)
                    if self.stopping is None:
                        self._fill()
                    if not self.running:
                        break
                    time.sleep(POLL)
            finally:
                for running in self.running:  # only behind an error of our own
                    running.process.stop(grace=0)
                    running.process.poll()

    def _fill(self) -> None:
        while self._look and len(self.running) < self.wanted.jobs:
            begun = self.study.start()
            if begun is None:
                self._look = False  # until a trial of ours ends: it may have failed and left its place
                return
            trial, searched = begun
            overrides = merged(self.wanted.callbacks(), self.fixed, searched)
            run = Run(self.folder / str(trial.number))
            shutil.rmtree(run.path, ignore_errors=True)  # of a study that began anew in this folder
            slot = min(set(range(self.wanted.jobs)) - {running.slot for running in self.running})
            process = TrialProcess(run, overrides, self._environment(slot))
            self.running.append(Running(trial, process, Curve(run.metrics, self.wanted.metric), slot))
            say(f"trial {trial.number:<3} started  {' '.join(searched)}")

    def _watch(self, running: Running) -> None:
        """Report new values of a trial, prune it if it is hopeless, settle it if it has ended."""
        ended = running.process.poll() is not None  # asked first, so that what it wrote last is read
        for step, value in running.curve.read():
            if running.broken or running.pruned_at is not None:
                break
            if not math.isfinite(value):
                running.broken = f"{self.wanted.metric} is {value} at step {step}"
                running.process.stop()
                break
            running.trial.report(value, step)
            last = self.study.steps.last
            if self.stopping is None and (last is None or step < last) and running.trial.should_prune():
                running.pruned_at = step
                running.process.stop()
        if ended:
            self.running.remove(running)
            self._look = True
            self._settle(running)

    def _settle(self, running: Running) -> None:
        """Tell the study how a trial ended."""
        trial, process, values = running.trial, running.process, running.curve.values
        finished = process.poll() == 0 and running.broken is None
        if finished and process.asked:  # Lightning may end a stopped run with 0: only the last step tells
            finished = max(values, default=0) == self.study.steps.last
        if finished and values:
            value = next(reversed(values.values()))
            self.study.complete(trial, value)
            process.record(None)
            self._failures.clear()
            self._report(running, f"{value:.4f}")
        elif running.pruned_at is not None:
            self.study.prune(trial)
            process.record(None, pruned_at=running.pruned_at)
            self._failures.clear()
            self._report(running, f"pruned   at step {running.pruned_at} with {values[running.pruned_at]:.4f}")
        elif self.stopping is not None and running.broken is None and not finished:
            self.study.give_back(trial)
            process.record("stopped with its search")
            self._report(running, "stopped")
        else:
            nothing = f"metrics.csv has no {self.wanted.metric}; its columns: {', '.join(running.curve.columns)}"
            error = running.broken or (nothing if finished else process.error())
            self.study.fail(trial, error)
            process.record(error)
            self._report(running, f"failed   {error}")
            self._failed(error.replace(str(process.run.path), "").replace(f"/{trial.number}/", "/"))

    def _failed(self, error: str) -> None:
        """Stop the search where going on would only burn time."""
        self._failures.append(error)
        well = any(record.state in ("complete", "pruned") for record in self.study.records())
        first = self._failures[:SAME_AT_FIRST]
        if not well and len(first) == SAME_AT_FIRST and len(set(first)) == 1:
            self._stop(f"the first {SAME_AT_FIRST} trials failed for the same reason: {error}")
        elif len(self._failures) >= IN_A_ROW:
            self._stop(f"{IN_A_ROW} trials failed one after another, the last because: {error}")

    def _stop(self, reason: str, grace: float = GRACE) -> None:
        self.stopping = self.stopping or reason
        for running in self.running:
            running.process.stop(grace)

    def _environment(self, slot: int) -> dict[str, str]:
        """Threads and GPU of the trial in a slot, so that trials that run together share the machine."""
        environment = {}
        if self.wanted.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, cores() // self.wanted.jobs))
        if self.wanted.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(self.wanted.gpus[slot % len(self.wanted.gpus)])
        return environment

    def _report(self, running: Running, what: str) -> None:
        records = self.study.records()
        ended = [record for record in records if record.state in ("complete", "pruned")]
        line = f"trial {running.trial.number:<3} {what}  ({running.process.seconds:.0f} s)"
        if top := best(records, self.wanted.direction):
            line += "  best so far" if top.number == running.trial.number else f"  best {top.value:.4f} of {top.number}"
        line += f"; {len(ended)} of {self.wanted.trials}"
        if ended and (left := self.wanted.trials - len(ended)) > 0:
            seconds = sum(record.seconds for record in ended) / len(ended) * left / self.wanted.jobs
            line += f", about {duration(seconds)} left"
        say(line)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal asks the trials to end, the second one ends them."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.signals += 1

        before = {number: signal.signal(number, ask) for number in signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def say(line: str) -> None:
    print(line, flush=True)
