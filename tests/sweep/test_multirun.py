"""A sweep's jobs stand alone: one may fail, all may be killed, and what is left is run with one command."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from elara.errors import EXIT_SAVED, ElaraError
from elara.plan import read_plan
from elara.report.outcome import read_outcome
from elara.runs import Run
from elara.sweep.multirun import newest_sweep, rewrite
from tests.conftest import PYTHON, alive, descendants

SHORT = ["trainer.max_steps=4", "trainer.val_check_interval=4", "~callbacks.samples", "~callbacks.acceptance"]


def sweep_folder(home, name: str) -> Path:
    (found,) = (home.path / "outputs" / "sweeps" / name).glob("*/")
    return found


def states(folder: Path, jobs: int) -> list[bool]:
    return [Run(folder / str(i)).finished for i in range(jobs)]


def make_sweep(folder: Path, task: list[str], hydra: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    record = {"hydra": {"overrides": {"task": task, "hydra": hydra or ["hydra.mode=MULTIRUN"]}}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump(record), "utf-8")
    return folder


def finish(folder: Path) -> None:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"finished": True}), "utf-8")


def test_jobs_are_named_by_what_differs_between_them(tmp_path: Path) -> None:
    plan = read_plan(make_sweep(tmp_path / "s", ["name=x", "moe=none,deepseek", "seed=3", "optimizer.lr=0.1,0.2"]))
    assert [plan.label(i) for i in range(4)] == [
        "moe=none optimizer.lr=0.1", "moe=none optimizer.lr=0.2",
        "moe=deepseek optimizer.lr=0.1", "moe=deepseek optimizer.lr=0.2",
    ]  # fmt: skip
    assert plan.jobs[3] == ["name=x", "moe=deepseek", "seed=3", "optimizer.lr=0.2"]


def test_a_sweep_goes_on_with_its_own_jobs(tmp_path: Path) -> None:
    task, hydra = ["name=bee", "moe=none,deepseek"], ["hydra.sweep.dir=old", "hydra.verbose=1"]
    folder = make_sweep(tmp_path / "it's a sweep", task, hydra)
    arguments = rewrite([f"sweep.resume={folder}", "name=bee", "launcher=joblib", "hydra.launcher.n_jobs=2"])
    quoted = str(folder).replace("'", "\\'")
    assert arguments == [
        "-m", "name=bee", "moe=none,deepseek", "hydra.verbose=1", "launcher=joblib", "hydra.launcher.n_jobs=2",
        f"hydra.sweep.dir='{quoted}'",
    ]  # fmt: skip
    with pytest.raises(ElaraError, match=r"goes on with the jobs that .* has: leave out seed="):
        rewrite([f"sweep.resume={folder}", "seed=2"])
    assert rewrite(["seed=1,2", "-m"]) == ["seed=1,2", "-m"]


def test_auto_takes_the_newest_sweep_with_a_job_left(tmp_path: Path) -> None:
    for time_, done in (("1", 0), ("2", 1), ("3", 2)):
        folder = make_sweep(tmp_path / "bee" / time_, ["seed=1,2"])
        for i in range(done):
            finish(folder / str(i))
    assert newest_sweep("bee", tmp_path).name == "2"
    finish(tmp_path / "bee" / "2" / "1")
    finish(tmp_path / "bee" / "1" / "0")
    finish(tmp_path / "bee" / "1" / "1")
    with pytest.raises(ElaraError, match=r"no sweep called 'bee' under .* has a job left to run"):
        newest_sweep("bee", tmp_path)


def test_a_job_whose_time_was_up_is_over_and_one_that_was_interrupted_is_not(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "bee" / "1", ["seed=1,2"])
    for i, code in enumerate((0, EXIT_SAVED)):
        run = Run(folder / str(i))
        run.path.mkdir()
        run.summary.write_text(json.dumps({"finished": False, "steps": 7}), "utf-8")
        run.job.write_text(json.dumps({"exit_code": code}), "utf-8")
    assert newest_sweep("bee", tmp_path) == folder
    assert [read_outcome(Run(folder / str(i))).state for i in range(2)] == ["finished", "failed"]
    Run(folder / "1").job.write_text(json.dumps({"exit_code": 0}), "utf-8")
    with pytest.raises(ElaraError, match="has a job left to run"):
        newest_sweep("bee", tmp_path)


@pytest.mark.slow
def test_a_failing_job_is_reported_and_the_others_go_on_in_one_tree(home) -> None:
    """The jobs train in two processes each, which Lightning's own launcher would turn into a second sweep."""
    options = home.tiny("name=isolated", "trainer=ddp_cpu", "data.batch_size=2", *SHORT)
    done = home.run("-m", *options, "moe=none,deepseek", "trm.depth=0,1")
    assert done.returncode == 2, done.stderr
    folder = sweep_folder(home, "isolated")
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["0", "1", "2", "3"]
    assert not (home.path / "outputs" / "train" / "isolated").exists()
    assert states(folder, 4) == [False, True, False, True]
    job = json.loads(Run(folder / "0").job.read_text("utf-8"))
    assert job["exit_code"] == 1 and job["error"] == "trm.depth=0 must be at least 1"
    assert Run(folder / "1").read_summary()["world_size"] == 2
    assert "[1/4] moe=none trm.depth=0: failed: trm.depth=0 must be at least 1" in done.stdout
    assert "2 of 4 jobs are not finished; run only those:" in done.stdout
    with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert (folder / "summary.png").stat().st_size > 10000
    assert "moe" in (folder / "summary.md").read_text("utf-8")


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_goes_on_with_what_is_missing(home) -> None:
    options = home.tiny("name=killed-sweep", "~callbacks.samples", "~callbacks.acceptance", "trainer=ddp_cpu")
    process = home.start("-m", *options, "seed=1,2,3", "trainer.max_steps=60")
    second = home.path / "outputs" / "sweeps" / "killed-sweep"
    deadline = time.monotonic() + 200
    while not list(second.glob("*/1/checkpoints/step-16")) and time.monotonic() < deadline:
        time.sleep(0.01)
    below = descendants(process.pid)
    assert len(below) == 3  # the job, and its two ranks
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(alive(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in below)
    folder = sweep_folder(home, "killed-sweep")
    assert states(folder, 3) == [True, False, False]
    before = Run(folder / "0").summary.stat().st_mtime_ns
    done = home.run("sweep.resume=auto", "name=killed-sweep")
    assert done.returncode == 0, done.stderr
    assert "[1/3] seed=1: finished already" in done.stdout and "seed=2: goes on from its last checkpoint" in done.stdout
    assert states(folder, 3) == [True, True, True]
    assert Run(folder / "0").summary.stat().st_mtime_ns == before
    steps = [int(row["step"]) for row in home.rows(folder / "1")]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_an_interrupt_saves_the_job_and_ends_the_sweep(home) -> None:
    options = home.tiny("name=stopped", "~callbacks.samples", "~callbacks.acceptance", "trainer.max_steps=100000")
    process = home.start("-m", *options, "seed=1,2")
    root = home.path / "outputs" / "sweeps" / "stopped"
    deadline = time.monotonic() + 200
    while not list(root.glob("*/0/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == EXIT_SAVED
    folder = sweep_folder(home, "stopped")
    assert errors.strip().splitlines()[-1] == (
        f"sweep interrupted; go on with: {PYTHON} -m elara.train sweep.resume={folder}"
    )
    assert Run(folder / "0").checkpoints() and not (folder / "1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_every_launcher_runs_the_jobs_and_counts_those_that_fail(home, launcher: str) -> None:
    needed = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "submitit", "ray": "ray"}
    pytest.importorskip(needed[launcher], reason="needs pip install 'elara-hivemind[sweep,ray]'")
    done = home.run("-m", f"launcher={launcher}", *home.tiny(f"name={launcher}", *SHORT), "trm.depth=0,1")
    folder = sweep_folder(home, launcher)
    assert done.returncode == 1, done.stderr
    assert states(folder, 2) == [False, True]
    assert json.loads(Run(folder / "0").job.read_text("utf-8"))["error"] == "trm.depth=0 must be at least 1"
    assert (folder / "summary.csv").is_file()


@pytest.mark.slow
def test_slurms_launcher_composes(home) -> None:
    pytest.importorskip("submitit", reason="needs pip install 'elara-hivemind[sweep]'")
    done = home.run("launcher=submitit_slurm", "hydra.launcher.gpus_per_node=8", "--cfg", "hydra")
    launcher = yaml.safe_load(done.stdout)["hydra"]["launcher"]
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher["gpus_per_node"], launcher["tasks_per_node"]) == (8, 1)
