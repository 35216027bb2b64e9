"""`python -m elara.train -m ...`: every job of a sweep in a process of its own, and one answer at the end.

Hydra's launchers, whichever it is, run `run_job`, which trains nothing itself: it starts `elara.train` with the job's
overrides. So a job that fails, or is killed, or takes several processes, leaves the others alone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from elara import trust
from elara.cli import check_effect_in_sweep, config_options, fail
from elara.errors import ElaraError, Interrupted
from elara.launch import child_environment, signals
from elara.overrides import is_override, key_of, quoted, value_of, without
from elara.plan import MULTIRUN, is_sweep, read_plan
from elara.runs import LOCK, Run, claim, project_root, python, sweep_root, worked_at
from elara.sweep.cluster import Cluster
from elara.sweep.process import failure, record

MOST_FAILED = 74  # the exit code above it says that a run was interrupted, with a checkpoint saved
NOT_THE_JOBS = ("launcher", "sweep", "hydra")  # what concerns the sweep, not the runs in it

_cluster: Cluster | None = None  # of the sweep that this process coordinates
_claimed: tuple[Path, IO[str]] | None = None  # its folder, and the lock on it


@dataclass
class Job:
    """One job as plain values, which any launcher can send anywhere. overrides: all of them, the sweep's own too."""

    sweep: Path
    number: int
    overrides: list[str]
    options: list[str] = field(default_factory=list)  # of the command line, such as --config-dir
    cwd: str = field(default_factory=os.getcwd)  # what relative paths are relative to, on whichever machine
    home: str = field(default_factory=lambda: str(project_root()))

    @property
    def run(self) -> Run:
        return Run(self.sweep / str(self.number))


def run_job(ray: Mapping[str, Any] | None) -> None:
    """Execute the job that Hydra has set up in this process, or, with the settings of `sweep.ray`, send it away."""
    global _cluster
    hydra: Any = HydraConfig.get()
    job = Job(Path(hydra.sweep.dir), int(hydra.job.num), list(hydra.overrides.task), config_options())
    if ray is None:
        execute(job)
        return
    if _cluster is None:
        _cluster = Cluster(**ray)
    _cluster.send(execute, job)


def execute(job: Job) -> None:
    """Train a job in a process of its own; say how it went, and never raise for it.

    A finished job is left as it is, one with a checkpoint goes on from there. Raises Interrupted when this process is
    asked to stop, once the job has saved.
    """
    run, plan = job.run, read_plan(job.sweep)
    place = f"[{job.number + 1}/{len(plan.jobs)}] {plan.label(job.number)}"
    if run.over:
        _say(f"{place}: finished already")
        return
    _say(f"{place}: {'goes on from its last checkpoint' if run.checkpoints() else 'started'} in {run.path}")
    began = time.monotonic()
    overrides = without(job.overrides, *NOT_THE_JOBS)
    arguments = [*job.options, *overrides, f"hydra.run.dir={quoted(str(run.path))}"]
    if run.checkpoints():
        arguments.append(f"resume={quoted(str(run.path))}")
    earlier = run.job_log.stat().st_size if run.job_log.exists() else 0  # bytes of an attempt before
    code = _train(job, arguments)
    seconds = time.monotonic() - began
    error = None if code == 0 else failure(run, code, earlier)
    record(run, code, error, seconds, overrides)
    _say(f"{place}: {_outcome(run) if error is None else f'failed: {error}'} ({seconds:.0f} s)")


class Report(Callback):
    """Around the jobs: nobody else runs this sweep, and behind the last one come its summary and exit code."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _claimed
        folder = Path(config.hydra.sweep.dir)
        try:
            if config.hydra.sweeper.get("params"):
                raise ElaraError("hydra.sweeper.params is not read: give the values on the command line, as key=a,b")
            if not is_sweep(folder):  # one that goes on stays as it was begun
                check_effect_in_sweep(config)
            _claimed = (folder, claim(folder))
        except ElaraError as error:
            with contextlib.suppress(OSError):
                folder.rmdir()  # made for it, and empty
            fail(error)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        try:
            if _cluster is not None:
                _cluster.wait()
            failed = _finish()
        except KeyboardInterrupt:
            fail(interrupted(folder))
        except Exception as error:  # Hydra would make a warning of it
            fail(error)
        if failed:
            raise SystemExit(min(failed, MOST_FAILED))


def end() -> None:
    """Write the summary of a sweep that Hydra's launcher gave up, or leave nothing of one that never began a job."""
    if _claimed is None:
        return
    folder = _claimed[0]
    if any(path.is_dir() for path in folder.glob("[0-9]*")):
        _finish()
        return
    for name in (MULTIRUN, LOCK):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def rewrite(arguments: list[str]) -> list[str]:
    """Let `sweep.resume=<folder>|auto` take over the arguments of the sweep that goes on.

    Jobs that are finished are not run again. Only launcher and hydra settings may be given anew: other overrides would
    make other jobs. Raises ElaraError when there is no such sweep, and for what a sweep cannot do.
    """
    given = {key_of(text): text for text in arguments if is_override(text)}
    _refuse(arguments, given)
    wanted = value_of(given["sweep.resume"]) if "sweep.resume" in given else ""
    if not wanted:
        return arguments
    folder = newest_sweep(_name(given)) if wanted == "auto" else Path(wanted).expanduser().resolve()
    plan = read_plan(folder)
    arguments, trusted = trust.taken(arguments)
    given = {key: text for key, text in given.items() if key != trust.TRUST}
    if foreign := [key for key in given if not f"{key}.".startswith(("sweep.", "launcher.", "hydra.", "name."))]:
        raise ElaraError(f"sweep.resume goes on with the jobs that {folder} has: leave out {foreign[0]}=...")
    given = {key: text for key, text in given.items() if key not in ("sweep.resume", "hydra.sweep.dir", "name")}
    replaced = {*given, "hydra.sweep.dir", "hydra.mode"}
    if not trusted:
        inherited = dict.fromkeys(text for texts in (*plan.jobs, plan.hydra) for text in texts)
        trust.check([text for text in inherited if key_of(text) not in replaced], given.values(), folder, sweep=True)
    kept = [text for text in [*plan.task, *plan.hydra] if key_of(text) not in replaced]
    options = [text for text in arguments if not is_override(text) and text not in ("-m", "--multirun")]
    return ["-m", *options, *kept, *given.values(), f"hydra.sweep.dir={quoted(str(folder))}"]


def go_on(sweep: Path) -> str:
    """The command that runs what a sweep still lacks."""
    return f"{python()} -m elara.train sweep.resume={shlex.quote(str(sweep))}"


def interrupted(sweep: Path) -> Interrupted:
    return Interrupted(f"sweep interrupted; go on with: {go_on(sweep)}", saved=True)


def newest_sweep(name: str, root: Path | None = None) -> Path:
    """The newest sweep called `name` that has a job left to run; raises ElaraError when there is none."""
    root = root or sweep_root()
    found = [file.parent for file in (root / name).glob(f"*/{MULTIRUN}")]
    for folder in sorted(found, key=worked_at, reverse=True):
        runs = [Run(folder / str(i)) for i in range(len(read_plan(folder).jobs))]
        if any(run.path.exists() for run in runs) and not all(run.over for run in runs):
            return folder
    raise ElaraError(f"nothing to resume: no sweep called '{name}' under {root} has a job left to run")


def _refuse(arguments: list[str], given: dict[str, str]) -> None:
    """Raise ElaraError for arguments that Hydra would take and that make no sweep of ours."""
    many = {"-m", "--multirun"} & set(arguments)
    if given.get("sweep.resume") == "sweep.resume=":
        raise ElaraError("sweep.resume= needs a sweep folder, or auto")
    if many and {"--cfg", "-c"} & set(arguments):
        raise ElaraError("--cfg shows the configuration of one run: leave out -m")
    if many and (found := next((text for text in given.values() if "=glob(" in text), None)):
        raise ElaraError(f"{found}: glob() is not read in a sweep, name the options, as key=a,b")
    if "launcher=ray" not in given.values() and any(key.startswith("sweep.ray") for key in given):
        raise ElaraError("sweep.ray is about launcher=ray: give that too")


def _finish() -> int:
    """Write and print the summary and let go of the folder; returns the number of jobs that are not finished."""
    global _claimed
    from elara.report import print_summary, summarize  # matplotlib takes a second to import

    assert _claimed is not None
    folder, lock = _claimed
    _claimed = None
    print_summary(summarize(folder))
    lock.close()
    jobs = read_plan(folder).jobs
    failed = sum(not Run(folder / str(i)).over for i in range(len(jobs)))
    if failed:
        _say(f"{failed} of {len(jobs)} jobs are not finished; run only those: {go_on(folder)}")
    return failed


def _train(job: Job, arguments: list[str]) -> int:
    """Run elara.train, its words into job.log and its progress to the terminal too; returns its exit code.

    A signal is passed on to it and ends the sweep, raising Interrupted, once the job has saved.
    """
    asked: list[int] = []
    run, prefix = job.run, f"[{job.number + 1}] "
    command = [sys.executable, "-m", "elara.train", *arguments]
    run.path.mkdir(parents=True, exist_ok=True)
    run.job.unlink(missing_ok=True)
    with open(run.job_log, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
            env=child_environment(ELARA_HOME=job.home), cwd=job.cwd, start_new_session=True,
        )  # fmt: skip

        def pass_on(number: int, frame: Any) -> None:
            asked.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in signals()}
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.startswith("step "):
                    _say(prefix + line.rstrip())
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if asked:
        raise interrupted(run.path.parent)
    return code


def _outcome(run: Run) -> str:
    metrics = run.read_summary().get("metrics", {})
    return f"done, held-out loss {metrics['val/loss_ar']:.3f}" if "val/loss_ar" in metrics else "done"


def _name(given: dict[str, str]) -> str:
    return value_of(given["name"]) if "name" in given else "elara"


def _say(line: str) -> None:
    print(line, flush=True)
