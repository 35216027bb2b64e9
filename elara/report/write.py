"""From what a user names to the page's file: which folder is meant, one page or several."""

from __future__ import annotations

import os
from pathlib import Path

from elara.errors import ElaraError
from elara.report.comparison import compare, is_comparison
from elara.report.outcome import Outcome, read_outcome
from elara.report.run_page import run_body, run_page
from elara.report.sweep_page import sweep_page
from elara.runs import Run, find_runs, project_root, python, sweep_root, train_root, worked_at, write_whole

PAGE = "report.html"
LARGEST = 4_000_000  # bytes of a page; the runs of a larger sweep get pages of their own


def find_folder(where: str | None = None) -> Path:
    """The folder of a run, sweep or search: given as it is, or the newest of a name; None: the newest run.

    Raises ElaraError when there is none.
    """
    if where is not None and _reportable(Path(where)):
        return Path(where)
    if where is None:
        runs = [run.path for run in find_runs()]
    elif where in ("", ".", "..") or "/" in where:
        runs = []
    else:
        dated = [*(run.path for run in find_runs(where)), *(sweep_root() / where).glob("*/")]
        search = project_root() / "outputs" / "searches" / where
        runs = [*sorted(dated, key=worked_at, reverse=True), search]
    if found := next((path for path in runs if _reportable(path)), None):
        return found
    if where is None:
        raise ElaraError(f"there is no run under {train_root()}: train one with `{python()} -m elara.train` first")
    if Path(where).is_dir():
        raise ElaraError(f"{where} is neither a run folder nor a sweep folder, and there is no run of that name")
    raise ElaraError(f"there is no folder '{where}', and no run, sweep or search of that name")


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the page of a run, sweep or search; returns its file, and those of runs that got pages of their own.

    output: the file; default report.html in the folder. Raises ElaraError when it cannot be written.
    """
    target = output or folder / PAGE
    if not is_comparison(folder):
        return [_write(target, run_page(read_outcome(Run(folder))))]
    comparison = compare(folder)
    bodies = {job.name: run_body(job, f"run-{job.name}", level=3) for job in comparison.jobs}
    if sum(map(len, bodies.values())) <= LARGEST:
        return [_write(target, sweep_page(comparison, bodies, lambda job: f"#run-{job.name}"))]
    pages = [_write(job.run.path / PAGE, run_page(job)) for job in comparison.jobs if job.state != "missing"]
    return [_write(target, sweep_page(comparison, {}, lambda job: _address(job, target))), *pages]


def _address(job: Outcome, target: Path) -> str:
    """Where a job's own page lies, seen from the sweep's."""
    if job.state == "missing":
        return f"#run-{job.name}"
    return Path(os.path.relpath(job.run.path / PAGE, target.parent)).as_posix()


def _reportable(folder: Path) -> bool:
    run = Run(folder)
    signs = (run.config, run.metrics, run.summary, run.job)
    return folder.is_dir() and (is_comparison(folder) or any(sign.exists() for sign in signs))


def _write(path: Path, text: str) -> Path:
    try:
        write_whole(path, text)
    except OSError as error:
        raise ElaraError(f"cannot write {path}: {error.strerror}") from error
    return path
