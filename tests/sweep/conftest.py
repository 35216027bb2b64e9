"""Searches over tiny trainings, in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from elara.sweep.compose import Steps
from elara.sweep.config import SearchConfig
from elara.sweep.overrides import merged, value_text
from elara.sweep.space import read_space
from elara.sweep.study import SharedStudy
from tests.conftest import TINY, Home
from tests.forks import Done, Forked

TRIAL = [override for override in TINY if not override.startswith("callbacks.")]


@dataclass
class Searches:
    """Starts `python -m elara.sweep` in a home of its own, and knows what its trials left running."""

    home: Home
    started: list[Forked] = field(default_factory=list)

    def folder(self, study: str) -> Path:
        return self.home.path / "outputs" / "searches" / study

    def start(self, study: str, *options: str, trial: tuple[str, ...] = (), text: str | None = None):
        """The search as a process whose stdout and stderr are pipes. trial: overrides of the trials."""
        path = text or str(self.home.text)
        command = [*options, f"study={study}", "--", *TRIAL, f"data.path={path}", *trial]
        process = self.home.start(*command, module="elara.sweep")
        self.started.append(process)
        return process

    def run(self, study: str, *options: str, trial: tuple[str, ...] = (), text: str | None = None) -> Done:
        process = self.start(study, *options, trial=trial, text=text)
        out, err = process.communicate(timeout=500)
        return Done(process.returncode, out, err)

    def queue(self, study: str, *rates: float, trial: tuple[str, ...] = ()) -> list[str]:
        """Make the study try these learning rates first, in this order; returns the options for that."""
        choice = {"optimizer": {"lr": {"type": "choice", "choices": sorted(set(rates))}}}
        fixed = [*TRIAL, f"data.path={self.home.text}", *trial]
        self.folder(study).mkdir(parents=True)
        made = SharedStudy(
            SearchConfig(study=study), read_space(choice), merged(fixed), self.folder(study), Steps(None, None)
        )
        for rate in rates:
            made.study.enqueue_trial({"optimizer.lr": value_text(rate)})
        return ["search=lr", "base=[]", f"trials={len(rates)}", "~space.optimizer", f"+space={value_text(choice)}"]

    def trials_running(self, study: str) -> list[int]:
        """Processes that train in the study's folder."""
        place = str(self.folder(study))
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if "elara.train" in command and place in command and state != "Z":
                found.append(int(entry.name))
        return found

    def wait_for(self, study: str, pattern: str, process: Forked) -> None:
        """Until a file of the study that matches is there, while the search runs."""
        deadline = time.monotonic() + 200
        while not list(self.folder(study).glob(pattern)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"no {pattern}"
            time.sleep(0.1)

    def wait_until_quiet(self, study: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while running := self.trials_running(study):
            assert time.monotonic() < deadline, f"still running: {running}"
            time.sleep(0.1)


@pytest.fixture
def searches(session_home: Home) -> Iterator[Searches]:
    made = Searches(session_home)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            process.communicate(timeout=60)


SPACE: dict[str, dict] = {
    "lr": {"type": "float", "low": 0.001, "high": 0.1, "log": True},
    "moe": {"type": "choice", "choices": ["a", "b"]},
}


def open_study(folder: Path, *, space=SPACE, fixed=(), **wanted) -> SharedStudy:
    """A study without trainings, as the search opens it."""
    return SharedStudy(SearchConfig(study="s", **wanted), read_space(space), fixed, folder, Steps(100, 10))
