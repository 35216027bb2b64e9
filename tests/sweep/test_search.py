"""Real searches over tiny trainings: the answer at the end, pruning, kills, sharing, failures."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

from elara.errors import EXIT_SAVED
from elara.runs import Run
from tests.sweep.conftest import Searches

pytestmark = pytest.mark.slow

PLAIN = ["search=lr", "base=[]", "pruner.name=none"]
RATE = "~space.optimizer.adam_lr"


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def states(folder: Path) -> list[str]:
    return [row["state"] for row in rows(folder)]


def counted(folder: Path) -> int:
    return sum(state in ("complete", "pruned") for state in states(folder))


def test_a_search_ends_with_the_command_that_repeats_its_best_trial(searches: Searches):
    done = searches.run("answer", *PLAIN, "trials=4", "jobs=2", "sampler.startup=2", RATE)
    assert (done.returncode, done.stderr) == (0, "")
    folder = searches.folder("answer")
    assert states(folder) == ["complete"] * 4
    for number in range(4):
        job = json.loads((folder / str(number) / "job.json").read_text("utf-8"))
        assert (job["exit_code"], job["error"]) == (0, None)
        assert "done: 24 steps" in (folder / str(number) / "job.log").read_text("utf-8")
    best = min(rows(folder), key=lambda row: float(row["val/loss_ar"]))
    assert f"best: trial {best['trial']}, val/loss_ar {float(best['val/loss_ar']):.4f}" in done.stdout

    command = (folder / "best.txt").read_text("utf-8").splitlines()[1]
    (printed,) = [line.strip() for line in done.stdout.splitlines() if line.endswith(command.removeprefix("python"))]
    pasted = printed + " callbacks=minimal name=pasted"
    assert os.waitstatus_to_exitcode(shell(pasted, searches)) == 0
    (run,) = (searches.home.path / "outputs" / "train" / "pasted").glob("*/")
    assert searches.home.rows(run)[-1]["val/loss_ar"] == best["val/loss_ar"], "to the last bit"


def shell(command: str, searches: Searches) -> int:
    """Run a line as a user would paste it; returns the wait status."""
    pid = os.fork()
    if pid == 0:
        os.chdir(searches.home.path)
        os.execve("/bin/sh", ["sh", "-c", f"{command} > pasted.log 2>&1"], searches.home.env())
    return os.waitpid(pid, 0)[1]


def test_a_hopeless_trial_is_pruned_early(searches: Searches):
    trial = ("trainer.max_steps=400", "trainer.val_check_interval=8", "trainer.log_every_n_steps=8")
    options = searches.queue("pruned", 0.02, 3.0, trial=trial)
    done = searches.run("pruned", *options, "pruner.startup=1", "pruner.warmup=0", trial=trial)
    assert (done.returncode, done.stderr) == (0, "")
    folder = searches.folder("pruned")
    assert [(row["optimizer.lr"], row["state"]) for row in rows(folder)] == [("0.02", "complete"), ("3.0", "pruned")]
    job = json.loads((folder / "1" / "job.json").read_text("utf-8"))
    assert job["pruned_at"] <= 80 and job["exit_code"] != 0 and job["error"] is None
    assert int(searches.home.rows(folder / "1")[-1]["step"]) < 400, "it did not train to its end"
    assert f"trial 1   pruned   at step {job['pruned_at']}" in done.stdout
    assert "pruning one trial saved about" in done.stdout


def test_a_search_that_is_stopped_or_killed_leaves_nothing_behind_and_goes_on_exactly(searches: Searches):
    options = [*PLAIN, "trials=4", "jobs=2", RATE]
    long = ("trainer.max_steps=160", "trainer.val_check_interval=80")
    folder = searches.folder("killed")

    search = searches.start("killed", *options, trial=long)
    searches.wait_for("killed", "*/metrics.csv", search)
    assert len(searches.trials_running("killed")) == 2
    search.send_signal(signal.SIGINT)
    out, err = search.communicate(timeout=60)
    assert search.returncode == EXIT_SAVED, err
    assert err.count("\n") == 1 and "the same command goes on" in err
    assert searches.trials_running("killed") == []
    assert set(states(folder)) <= {"stopped", "complete"}
    before = counted(folder)

    search = searches.start("killed", *options, trial=long)
    searches.wait_for("killed", "[23]/metrics.csv", search)
    running = searches.trials_running("killed")
    assert running
    os.kill(search.pid, signal.SIGKILL)
    search.communicate()
    searches.wait_until_quiet("killed", 30)
    unfinished = [trial for trial in folder.glob("[0-9]*") if not (trial / "job.json").exists()]
    assert unfinished and not any(Run(trial).finished for trial in unfinished), "they ended before their last step"

    done = searches.run("killed", *options, trial=long)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run again, as their search was killed: " in done.stdout
    assert counted(folder) == 4
    assert before < 4
    values = [row["optimizer.lr"] for row in rows(folder) if row["state"] == "complete"]
    stopped = [row["optimizer.lr"] for row in rows(folder) if row["state"] == "stopped"]
    assert len(set(values)) == 4, "no value twice"
    assert stopped and set(stopped) <= set(values), "and none lost"


def test_two_searches_share_a_study_and_reach_its_number_exactly(searches: Searches):
    options = [*PLAIN, "trials=4", RATE]
    both = [searches.start("shared", *options), searches.start("shared", *options)]
    outs = [search.communicate(timeout=500) for search in both]
    assert [search.returncode for search in both] == [0, 0], outs
    folder = searches.folder("shared")
    assert states(folder) == ["complete"] * 4
    assert sorted(int(trial.name) for trial in folder.glob("[0-9]*")) == [0, 1, 2, 3]
    started = [out.count("started") for out, _ in outs]
    assert sum(started) == 4 and min(started) >= 1


def test_a_search_whose_first_trials_all_fail_alike_stops_with_their_reason_and_may_be_corrected(searches: Searches):
    options = [*PLAIN, "trials=9", RATE]
    done = searches.run("broken", *options, text="/nowhere/at all.txt")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the first 3 trials failed for the same reason: ")
    assert "/nowhere/at all.txt" in done.stderr and done.stderr.count("\n") == 1
    folder = searches.folder("broken")
    assert states(folder) == ["failed"] * 3
    assert "/nowhere/at all.txt" in json.loads((folder / "2" / "job.json").read_text("utf-8"))["error"]
    done = searches.run("broken", *PLAIN, "trials=1", RATE)
    assert done.returncode == 0
    assert states(folder) == ["complete"]


def test_a_diverged_trial_is_told_and_the_search_goes_on(searches: Searches):
    options = searches.queue("diverged", 1e30, 0.02)
    done = searches.run("diverged", *options, "trials=1")
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(searches.folder("diverged"))
    assert [row["state"] for row in found] == ["failed", "complete"], "a failed trial does not count"
    assert "nan at step" in found[0]["error"] and found[0]["error"] in done.stdout


def test_the_time_limit_stops_the_search_and_the_same_command_goes_on(searches: Searches):
    begin = time.monotonic()
    long = ("trainer.max_steps=100000", "trainer.val_check_interval=1000")
    done = searches.run("timed", *PLAIN, "trials=2", "timeout=0.25", RATE, trial=long)
    assert done.returncode == 0
    assert time.monotonic() - begin < 120
    assert "the time is up at 0 of 2 trials: the same command goes on" in done.stdout
    assert searches.trials_running("timed") == []
    assert states(searches.folder("timed")) == ["stopped"]
