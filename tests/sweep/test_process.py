"""Why a process failed is what it said itself, this time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from elara.runs import Run
from elara.sweep.process import failure, record

BEFORE = "error: of the attempt before\n"


@pytest.mark.parametrize(
    ("said", "code", "line"),
    [
        ("step 1\nerror: no such thing\n", 1, "no such thing"),
        ("step 1\nTraceback\n", 1, "Traceback"),
        ("step 1\n", -signal.SIGKILL, "killed by SIGKILL"),
        ("", 3, "ended with exit code 3 and no word"),
    ],
)
def test_the_reason_is_of_this_attempt(tmp_path: Path, said: str, code: int, line: str) -> None:
    run = Run(tmp_path)
    run.job_log.write_text(BEFORE + said, "utf-8")
    assert failure(run, code, len(BEFORE)) == line


def test_a_job_that_ended_well_without_a_summary_is_finished(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for code in (1, 0):
        record(run, code, None, 1.23, ["seed=1"])
        assert run.finished is (code == 0)
    assert run.read_job() == {"exit_code": 0, "error": None, "seconds": 1.2, "overrides": ["seed=1"]}
    run.summary.write_text('{"finished": false}', "utf-8")
    assert not run.finished
