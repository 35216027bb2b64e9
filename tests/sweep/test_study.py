"""The shared study: exact numbers under contention, what becomes of the dead, draws that do not repeat."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from elara.errors import ElaraError
from elara.sweep.config import PrunerConfig, SamplerConfig
from elara.sweep.study import STOPPED, SharedStudy
from tests.payloads import pickled
from tests.sweep.conftest import SPACE, open_study

SPAWN = multiprocessing.get_context("spawn")
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


def begin(study: SharedStudy) -> tuple[optuna.Trial, list[str]]:
    begun = study.start()
    assert begun is not None
    return begun


def in_process(task: Callable, *arguments: object) -> None:
    """Run `task` in a process that ends without a word to anybody, as a killed one does."""
    process = SPAWN.Process(target=task, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0 or process.exitcode == -signal.SIGKILL


def start_and_die(folder: Path, host: str | None = None, complete: int = 0, start: int = 1, **wanted: object) -> None:
    if host is not None:
        socket.gethostname = lambda: host  # a process of another machine
    study = open_study(folder, **wanted)
    for _ in range(complete):
        study.complete(begin(study)[0], 1.0)
    for _ in range(start):
        begin(study)
    os.kill(os.getpid(), signal.SIGKILL)


def work(folder: Path, results: multiprocessing.Queue) -> None:
    study = open_study(folder, trials=24)
    done = 0
    while (begun := study.start()) is not None:
        study.complete(begun[0], float(begun[0].number))
        done += 1
    results.put(done)


@pytest.mark.slow
def test_processes_that_share_a_study_reach_its_number_exactly(tmp_path: Path):
    results = SPAWN.Queue()
    workers = [SPAWN.Process(target=work, args=(tmp_path, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    counts = [results.get(timeout=100) for _ in workers]
    for worker in workers:
        worker.join()
    records = open_study(tmp_path, trials=24).records()
    assert sum(counts) == 24
    assert [(record.number, record.state) for record in records] == [(number, "complete") for number in range(24)]
    assert len({record.values["lr"] for record in records}) == 24, "processes with one seed draw different values"


def test_running_trials_count_until_they_fail(tmp_path: Path):
    study = open_study(tmp_path, trials=2)
    first, _ = begin(study)
    second, _ = begin(study)
    assert study.start() is None
    study.fail(second, "it broke")
    third, _ = begin(study)
    study.prune(third)
    study.complete(first, 1.0)
    assert study.start() is None
    assert [(record.state, record.error) for record in study.records()] == [
        ("complete", None), ("failed", "it broke"), ("pruned", None),
    ]  # fmt: skip


@pytest.mark.slow
def test_trials_of_a_killed_search_are_run_again_with_the_same_values(tmp_path: Path):
    in_process(start_and_die, tmp_path, None, 1, 2)
    study = open_study(tmp_path, trials=3)
    before = study.records()
    assert [record.state for record in before] == ["complete", "stopped", "stopped"]
    assert study.revived == [1, 2]
    again = [begin(study), begin(study)]
    assert [overrides for _, overrides in again] == [record.overrides for record in before[1:]]
    assert study.start() is None


@pytest.mark.slow
def test_a_trial_that_kills_its_search_every_time_is_given_up(tmp_path: Path):
    for _ in range(3):
        in_process(start_and_die, tmp_path)
    study = open_study(tmp_path)
    assert study.revived == []
    records = study.records()
    assert [record.state for record in records] == ["stopped"] * 3
    assert len({record.values["lr"] for record in records}) == 1
    begin(study)
    assert study.records()[-1].values["lr"] != records[0].values["lr"]


@pytest.mark.slow
def test_trials_of_living_processes_and_of_other_machines_are_left_alone(tmp_path: Path):
    mine = open_study(tmp_path)
    begin(mine)
    in_process(start_and_die, tmp_path, "far-away")
    other = open_study(tmp_path)
    assert other.revived == []
    assert [(record.state, record.host) for record in other.elsewhere()] == [("running", "far-away")]
    assert open_study(tmp_path, dead=["nobody"]).revived == []
    assert open_study(tmp_path, dead=["far-away"]).revived == [1]
    assert [record.state for record in mine.records()] == ["running", "stopped"]


def test_a_trial_that_was_stopped_comes_again_before_new_ones(tmp_path: Path):
    study = open_study(tmp_path)
    trial, overrides = begin(study)
    study.give_back(trial)
    assert study.records()[0].error == STOPPED
    assert begin(study)[1] == overrides


def test_draws_depend_on_seed_and_trial_only(tmp_path: Path):
    def draws(folder: Path, restarts: bool, seed: int) -> list[list[str]]:
        folder.mkdir()
        study, found = open_study(folder, seed=seed), []
        for number in range(12):
            trial, overrides = begin(study)
            study.complete(trial, (trial.params["lr"] - 0.01) ** 2 + number % 3)
            found.append(overrides)
            if restarts:
                study = open_study(folder, seed=seed)
        return found

    once = draws(tmp_path / "a", False, 1)
    assert draws(tmp_path / "b", True, 1) == once
    assert draws(tmp_path / "c", False, 2) != once
    assert len({tuple(overrides) for overrides in once}) == 12


def test_the_state_of_cmaes_is_read_and_nothing_else_of_a_journal_runs(tmp_path: Path):
    marker = tmp_path / "marker"
    wanted = {"sampler": SamplerConfig("cmaes", startup=1), "trials": 40, "pruner": PrunerConfig("none")}
    space = {key: {"type": "float", "low": 0.0, "high": 1.0} for key in ("optimizer.lr", "optimizer.eps")}
    study = open_study(tmp_path, space=space, **wanted)
    for _ in range(14):  # a first trial and more than two generations of six
        trial, _ = begin(study)
        study.complete(trial, sum(value**2 for value in trial.params.values()))
    attributes = [pair for record in study.study.trials for pair in record.system_attrs.items()]
    assert {value for key, value in attributes if key.endswith(":generation")} == {0, 1, 2}  # each from the last one
    journal = tmp_path / "journal.log"
    text = re.sub(r'(optimizer:[1-9]": ?)"[0-9a-f]+"', r'\1""', journal.read_text("utf-8"))
    text, count = re.subn(r'(optimizer:0": ?)"[0-9a-f]+"', rf'\1"{pickled(marker).hex()}"', text)
    assert count
    journal.write_text(text, "utf-8")
    with pytest.raises(ElaraError, match=r"it names posix\.system\): do not trust this study"):
        open_study(tmp_path, space=space, **wanted).start()
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_the_sampler_learns_where_the_good_values_lie(tmp_path: Path, sampler: str):
    space = {"a": {"type": "float", "low": -5, "high": 5}, "b": {"type": "float", "low": -5, "high": 5}}
    study = open_study(tmp_path, space=space, trials=60, sampler=SamplerConfig(sampler, 8))
    while (begun := study.start()) is not None:
        values = begun[0].params
        study.complete(begun[0], (values["a"] - 2) ** 2 + (values["b"] + 1) ** 2)
    losses = [record.value or 0.0 for record in study.records()]
    assert sum(losses[40:]) / 20 < 0.35 * sum(losses[:8]) / 8


def test_a_study_with_results_keeps_what_it_was_begun_with(tmp_path: Path):
    study = open_study(tmp_path, fixed=["a=1"])
    study.complete(begin(study)[0], 1.0)
    open_study(tmp_path, fixed=["a=1"], trials=99)
    changes: list[tuple[dict, str]] = [
        ({"fixed": ["a=2"]}, "another overrides"),
        ({"fixed": ["a=1"], "metric": "val/loss"}, "another metric"),
        ({"fixed": ["a=1"], "direction": "maximize"}, "another direction"),
        ({"fixed": ["a=1"], "space": {**SPACE, "lr": {**SPACE["lr"], "high": 0.2}}}, "another space"),
    ]
    for change, words in changes:
        with pytest.raises(ElaraError, match=words):
            open_study(tmp_path, **change)


def test_a_study_without_results_may_be_corrected(tmp_path: Path):
    study = open_study(tmp_path, fixed=["typo=1"])
    study.fail(begin(study)[0], "unknown key")
    corrected = open_study(tmp_path, fixed=["a=1"])
    assert corrected.records() == []
    assert begin(corrected)[0].number == 0


def test_half_a_line_at_the_end_of_the_journal_is_mended(tmp_path: Path):
    study = open_study(tmp_path)
    study.complete(begin(study)[0], 1.0)
    with open(tmp_path / "journal.log", "a", encoding="utf-8") as file:
        file.write('{"op_code":5,"work')  # as a full disk leaves it
    study = open_study(tmp_path)
    study.complete(begin(study)[0], 2.0)
    assert [record.value for record in open_study(tmp_path).records()] == [1.0, 2.0]


def test_a_journal_that_is_damaged_is_one_line(tmp_path: Path):
    study = open_study(tmp_path)
    study.complete(begin(study)[0], 1.0)
    journal = tmp_path / "journal.log"
    lines = journal.read_text("utf-8").splitlines(keepends=True)
    journal.write_text("".join([*lines[:3], "no json\n", *lines[3:]]), "utf-8")
    with pytest.raises(ElaraError, match=r"journal\.log cannot be read .* move it away"):
        open_study(tmp_path)


def curves(study: SharedStudy, losses: dict[int, float]) -> dict[int, int]:
    """Let trials report an even loss at steps 10, 20, ... 100; returns the step each one came to."""
    reached = {}
    while (begun := study.start()) is not None:
        trial = begun[0]
        for step in range(10, 101, 10):
            trial.report(losses[trial.number], step)
            reached[trial.number] = step
            if step < 100 and trial.should_prune():
                study.prune(trial)
                break
        else:
            study.complete(trial, losses[trial.number])
    return reached


def test_the_median_pruner_waits_for_its_trials_and_its_warmup(tmp_path: Path):
    losses = {number: 2.0 + 0.1 * (number % 5) for number in range(12)}
    reached = curves(open_study(tmp_path, trials=12, pruner=PrunerConfig("median", startup=3, warmup=40)), losses)
    assert [reached[number] for number in range(3)] == [100] * 3
    assert reached[4] == reached[9] == 40, "worse than the median, at the first look behind the warm-up"
    assert reached[5] == reached[10] == 100, "the best"


def test_hyperband_gives_most_steps_to_the_best(tmp_path: Path):
    losses = {number: 2.0 + 0.1 * (number % 9) for number in range(45)}
    reached = curves(open_study(tmp_path, trials=45, pruner=PrunerConfig("hyperband", reduction=3)), losses)
    steps = {rank: sum(step for number, step in reached.items() if number % 9 == rank) for rank in (0, 8)}
    assert steps[0] > 1.5 * steps[8]
    assert sum(reached.values()) < 0.7 * 45 * 100
    assert {10, 30} <= set(reached.values()), "the stages lie at the validations"


def test_without_a_pruner_every_trial_comes_to_its_end(tmp_path: Path):
    losses = {number: float(number) for number in range(8)}
    assert set(curves(open_study(tmp_path, trials=8, pruner=PrunerConfig("none")), losses).values()) == {100}
