"""However training ends, its last step is saved, and the record says whether there is more to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from elara import checkpoint
from elara.runs import Run

SHORT = ["~callbacks.samples", "~callbacks.acceptance", "trainer.max_steps=9"]
ACCUMULATE = "trainer.accumulate_grad_batches=3"


class StopAt(Callback):
    """Asks for the end of training at a micro-batch, as any callback may."""

    def __init__(self, micro: int) -> None:
        self.micro = micro

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.micro:
            trainer.should_stop = True


def tiny(home, *overrides: str) -> list[str]:
    """A small run of 9 steps without what only reports."""
    bare = [text for text in home.tiny() if not text.startswith(("callbacks.", "trainer.max_steps"))]
    given = {text.partition("=")[0] for text in overrides}
    return [*bare, *(text for text in SHORT if text.partition("=")[0] not in given), *overrides]


def stop_at(micro: int) -> list[str]:
    return ["+callbacks.stop._target_=tests.training.test_ending.StopAt", f"+callbacks.stop.micro={micro}"]


@pytest.fixture(scope="session")
def unbroken(session_home) -> Path:
    done = session_home.call(*tiny(session_home, "name=unbroken", ACCUMULATE))
    assert done.returncode == 0, done.stderr
    return session_home.only_run("unbroken")


@pytest.mark.slow
@pytest.mark.parametrize(("micro", "step"), [(9, 3), (13, 5)])
def test_a_run_that_a_callback_ends_is_saved_at_a_whole_step_and_goes_on_exactly(
    home, unbroken: Path, micro: int, step: int
) -> None:
    """(13: in the middle of the gradients of step 5)"""
    name = f"stopped-{micro}"
    done = home.call(*tiny(home, f"name={name}", ACCUMULATE, *stop_at(micro)))
    assert done.returncode == 0, done.stderr
    assert f"stopped at step {step} of 9" in done.stdout and "resume=" in done.stdout.splitlines()[-1]
    run = Run(home.only_run(name))
    summary = run.read_summary()
    assert summary["finished"] is False and summary["steps"] == step
    meta = checkpoint.read_meta(run.last)
    assert meta["step"] == step and meta["validation_due"] is False and "val/loss_ar" in meta["metrics"]

    done = home.call("resume=auto", f"name={name}", *stop_at(1000))
    assert done.returncode == 0, done.stderr
    assert f"going on at step {step} in" in done.stdout and run.finished
    a, b = (checkpoint.load(Run(path).last).model.state_dict() for path in (run.path, unbroken))
    assert all(torch.equal(a[key], b[key]) for key in a)
    train = [[{k: v for k, v in row.items() if "val/" not in k} for row in home.rows(p)] for p in (run.path, unbroken)]
    assert train[0] == train[1]


@pytest.mark.slow
def test_a_run_whose_time_is_up_is_not_finished_and_takes_more_time(home) -> None:
    endless = tiny(home, "name=timed", "trainer.max_steps=100000", "trainer.val_check_interval=100000")
    done = home.call(*endless, "+trainer.max_time={seconds: 1}")
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("timed"))
    summary = run.read_summary()
    assert summary["finished"] is False and "val/loss_ar" in summary["metrics"]
    assert checkpoint.read_meta(run.last)["step"] == summary["steps"] > 0

    done = home.call("resume=auto", "name=timed")
    assert done.returncode == 0, done.stderr
    assert f"stopped at step {summary['steps']} of 100000" in done.stdout and "trainer.max_time=..." in done.stdout
    assert run.read_summary() == summary

    more = summary["steps"] + 2
    done = home.call("resume=auto", "name=timed", "trainer.max_time=01:00:00:00", f"trainer.max_steps={more}")
    assert done.returncode == 0, done.stderr
    assert run.finished and run.read_summary()["steps"] == more


def test_early_stopping_finishes_a_run(home) -> None:
    stopper = "+callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss_ar, %s}"
    done = home.call(*tiny(home, "name=early", stopper % "stopping_threshold: 100.0"))
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("early"))
    assert "done: 8 steps" in done.stdout and run.finished and run.last.resolve().name == "step-8"
    done = home.call("resume=auto", "name=early")
    assert done.returncode == 1 and "finished" in done.stderr


def test_a_smallest_number_of_steps_is_kept_and_its_steps_are_not_saved_one_by_one(home) -> None:
    done = home.call(*tiny(home, "name=least", "+trainer.min_steps=5", "callbacks.checkpoint.keep=9", *stop_at(2)))
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("least"))
    assert [path.name for path in run.checkpoints()] == ["step-5"]
    assert json.loads(run.summary.read_text("utf-8"))["finished"] is False
