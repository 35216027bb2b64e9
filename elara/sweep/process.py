"""`python -m elara.train` as a process of a sweep or search: its job.log, and job.json when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elara.launch import child_environment, signal_name
from elara.overrides import quoted
from elara.runs import Run, write_whole

GRACE = 10.0  # seconds between asking a trial to end and ending it


@dataclass
class TrialProcess:
    """A running `elara.train`, which ends by itself when this process dies."""

    run: Run
    overrides: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    _deadline: float = float("inf")

    def __post_init__(self) -> None:
        self.run.path.mkdir(parents=True, exist_ok=True)
        place = f"hydra.run.dir={quoted(str(self.run.path))}"
        self._begin = time.monotonic()
        with open(self.run.job_log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "elara.train", *self.overrides, place],
                env=child_environment(**self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches the search only, which then ends its trials
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    @property
    def asked(self) -> bool:
        """Whether `stop` was called."""
        return self._deadline < float("inf")

    def poll(self) -> int | None:
        """The exit code once the process has ended, negative for a signal; one asked to end may end by force here."""
        if self._process.poll() is None and time.monotonic() >= self._deadline:
            self._kill_group()
            self._process.wait()
        if self._process.returncode is not None:
            self._kill_group()  # what it may have left behind, such as data workers
        return self._process.returncode

    def stop(self, grace: float = GRACE) -> None:
        """Ask the trial to end; `poll` kills its group when `grace` seconds have not been enough."""
        if not self.asked and self._process.poll() is None:
            self._process.terminate()
        self._deadline = min(self._deadline, time.monotonic() + grace)

    def record(self, error: str | None, **more: Any) -> None:
        """Write job.json: how it ended, with `more` entries."""
        record(self.run, self._process.returncode, error, self.seconds, self.overrides, **more)

    def error(self) -> str:
        """The line that says why the process failed."""
        return failure(self.run, self._process.returncode)

    def _kill_group(self) -> None:
        if sys.platform == "win32":
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def record(
    run: Run, code: int, error: str | None, seconds: float, overrides: Sequence[str], **more: Any
) -> None:
    """Write job.json: how the process ended, with `more` entries."""
    about = {"exit_code": code, "error": error, "seconds": round(seconds, 1), "overrides": list(overrides), **more}
    write_whole(run.job, json.dumps(about, indent=2) + "\n")


def failure(run: Run, code: int, since: int = 0) -> str:
    """The line that says why a process failed: its own, or the signal that ended it. since: where job.log begins."""
    try:
        lines = run.job_log.read_bytes()[since:].decode("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if code < 0:
        return f"killed by {signal_name(code)}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last or f"ended with exit code {code} and no word"


def started(pid: int) -> str | None:
    """When the process began, as a text that no other process of this machine ever has; None when there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
