"""A killed and resumed run is the uninterrupted run, and what cannot be resumed says so in one line."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from elara import checkpoint
from elara.errors import EXIT_SAVED
from elara.overrides import key_of
from elara.runs import Run, find_checkpoint
from elara.training.callbacks import Throughput
from elara.training.resume import rewrite
from elara.training.schedules import wsd
from tests import forks
from tests.conftest import PYTHON, traces

ACCUMULATE = "trainer.accumulate_grad_batches=2"


def some_slow(*values: str) -> list[Any]:
    """Values of a parameter whose tests run with the slow ones."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="session")
def whole(session_home) -> Path:
    """An uninterrupted run of 24 steps."""
    done = session_home.call(*session_home.tiny("name=whole", ACCUMULATE))
    assert done.returncode == 0, done.stderr
    return session_home.only_run("whole")


def same_run(home, one: Path, other: Path) -> None:
    """Every logged figure and every weight agree bit for bit."""
    assert home.rows(one) == home.rows(other)
    a, b = (checkpoint.load(Run(path).last).model.state_dict() for path in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert Run(one).best.readlink() == Run(other).best.readlink()
    assert (one / "samples.txt").read_text("utf-8") == (other / "samples.txt").read_text("utf-8")


@pytest.mark.parametrize(("workers", "step"), [(0, 13), pytest.param(2, 19, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted(home, whole: Path, workers: int, step: int) -> None:
    name = f"killed-{workers}"
    run = home.kill_at(step, name, *home.tiny(ACCUMULATE, f"data.workers={workers}"))
    done = home.run("resume=auto", f"name={name}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on at step (8|16) in", done.stdout)
    same_run(home, run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 7, 8, 16, 22])
def test_any_step_may_be_the_one(home, whole: Path, step: int) -> None:
    run = home.kill_at(step, f"any-{step}", *home.tiny(ACCUMULATE))
    done = home.call(f"resume={run}")
    assert done.returncode == 0, done.stderr
    same_run(home, run, whole)


@pytest.mark.slow
def test_two_processes_resume_exactly_too(home) -> None:
    options = home.tiny("trainer=ddp_cpu", "data.batch_size=2")
    assert home.run("name=ddp", *options).returncode == 0
    run = home.kill_at(13, "ddp-killed", *options)
    time.sleep(8)  # the other rank notices, and leaves
    assert home.run("resume=auto", "name=ddp-killed").returncode == 0
    same_run(home, run, home.only_run("ddp"))


@pytest.mark.slow
def test_saving_by_the_clock_changes_nothing_and_what_it_saved_goes_on_exactly(home, whole: Path) -> None:
    often = ["callbacks.checkpoint.every_minutes=1e-4", "callbacks.checkpoint.keep=30"]
    done = home.call(*home.tiny("name=by-the-clock", ACCUMULATE, *often))
    assert done.returncode == 0, done.stderr
    run = home.only_run("by-the-clock")
    saved = {path.name for path in Run(run).checkpoints()}
    assert {"step-11", "step-13"} <= saved, "between validations, every 8 steps"
    same_run(home, run, whole)

    killed = copy_as_killed(run, "by-the-clock-killed", step=13)
    done = home.call(f"resume={killed}")
    assert done.returncode == 0 and "going on at step 13 in" in done.stdout, done.stderr
    same_run(home, killed, whole)


def test_minutes_between_saves_must_be_some(home) -> None:
    done = home.call(*home.tiny("name=never", "callbacks.checkpoint.every_minutes=0"))
    assert done.returncode == 1 and "callbacks.checkpoint.every_minutes=0 must be above 0" in done.stderr


@pytest.mark.slow
def test_validating_and_sampling_leave_no_trace_in_training(home, whole: Path) -> None:
    done = home.call(*home.tiny("name=quiet", ACCUMULATE, "trainer.val_check_interval=24"))
    assert done.returncode == 0, done.stderr
    pairs = zip(home.rows(home.only_run("quiet")), home.rows(whole), strict=True)
    for quiet, row in pairs:
        assert {k: v for k, v in quiet.items() if "val/" not in k} == {k: v for k, v in row.items() if "val/" not in k}


def copy_as_killed(whole: Path, name: str, *, step: int) -> Path:
    """A copy of a finished run as it would look had it been killed after the checkpoint of `step` was saved."""
    folder = whole.parent.parent / name / whole.name
    shutil.copytree(whole, folder, symlinks=True)
    run = Run(folder)
    for path in run.checkpoints():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name_ in (run.last, run.best):
        checkpoint.link(run.checkpoints()[0], name_)
    summary = json.loads(run.summary.read_text("utf-8"))
    run.summary.write_text(json.dumps({**summary, "finished": False}), "utf-8")
    return folder


@pytest.mark.slow
def test_a_run_killed_during_validation_makes_up_for_it(home, whole: Path) -> None:
    run = Run(copy_as_killed(whole, "mid-validation", step=16))
    meta = checkpoint.read_meta(run.last)
    del meta["metrics"]
    checkpoint.write_json(run.last / "meta.json", {**meta, "validation_due": True})
    with open(run.metrics, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) <= 16]
    for name in rows[-1]:
        if name.startswith("val/"):
            rows[-1][name] = ""
    with open(run.metrics, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    done = home.call("resume=auto", "name=mid-validation")
    assert done.returncode == 0, done.stderr
    same_run(home, run.path, whole)


@pytest.mark.slow
def test_a_run_killed_in_its_last_validation_is_finished_when_it_has_made_up_for_it(home, whole: Path) -> None:
    run = Run(copy_as_killed(whole, "last-validation", step=24))
    checkpoint.write_json(run.last / "meta.json", {**checkpoint.read_meta(run.last), "validation_due": True})
    done = home.call("resume=auto", "name=last-validation")
    assert done.returncode == 0, done.stderr
    assert run.finished and run.read_summary()["steps"] == 24
    done = home.call("resume=auto", "name=last-validation")
    assert done.returncode == 1 and "every run called 'last-validation' is finished" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_whose_validation_gave_no_numbers_is_passed_by(home, whole: Path) -> None:
    run = Run(copy_as_killed(whole, "no-numbers", step=24))
    checkpoint.write_json(run.last / "meta.json", {**checkpoint.read_meta(run.last), "finite": False})
    done = home.call("resume=auto", "name=no-numbers")
    assert done.returncode == 0, done.stderr
    assert "step-24: its held-out loss is nan or infinite; going back to step-16" in done.stdout
    same_run(home, run.path, whole)


@pytest.mark.slow
def test_a_run_that_blows_up_after_going_on_says_how_to_go_back(home, whole: Path) -> None:
    run = Run(copy_as_killed(whole, "blown-up", step=16))
    clip = "trainer.gradient_clip_val"
    wild = ["optimizer.lr=1e25", "optimizer.adam_lr=1e25", "trainer.val_check_interval=1", f"{clip}=0"]
    done = home.call(f"resume={run.path}", *wild)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "delete checkpoints/step-16, from which it went on, to go back further" in done.stderr
    for path in run.checkpoints():
        if path.name not in ("step-8", "step-16"):
            shutil.rmtree(path)  # whatever was saved of it
    calm = ["optimizer.lr=0.02", "optimizer.adam_lr=0.004", "trainer.val_check_interval=8", f"{clip}=1"]
    done = home.call(f"resume={run.path}", *calm)
    assert done.returncode == 0, done.stderr


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(home, whole: Path) -> None:
    run = Run(copy_as_killed(whole, "damaged", step=24))
    state = run.last / "trainer.ckpt"
    state.write_bytes(state.read_bytes()[:-100])
    done = home.call("resume=auto", "name=damaged")
    assert done.returncode == 0, done.stderr
    assert "trainer.ckpt is damaged: its checksum differs" in done.stdout and "going back to step-16" in done.stdout
    same_run(home, run.path, whole)


def test_another_architecture_is_refused_by_name(home, whole: Path) -> None:
    copy_as_killed(whole, "wider", step=24)
    done = home.call("resume=auto", "name=wider", "model.hidden=96")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "has another architecture: model.hidden is 64 there and 96 here" in done.stderr


@pytest.mark.slow
def test_another_tokenizer_is_refused(home, whole: Path) -> None:
    copy_as_killed(whole, "retokenized", step=24)
    done = home.call("resume=auto", "name=retokenized", "tokenizer=byte", "model.vocab_size=64")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "model.vocab_size=64 is too small" in done.stderr
    done = home.call(f"init_from={whole}", *home.tiny("name=new", "tokenizer=byte"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "tokenizer" in done.stderr and "fingerprint" in done.stderr


def test_a_run_is_found_by_its_name(home, whole: Path) -> None:
    done = home.call(f"resume={whole.parent.name}")
    assert done.returncode == 1 and f"{whole} is finished at step 24: give a larger trainer.max_steps" in done.stderr
    done = home.call("resume=nobody")
    assert done.returncode == 1 and "nobody is not a run folder" in done.stderr


def test_a_finished_run_says_so_and_goes_on_when_asked_for_more(home, whole: Path) -> None:
    run = Run(whole.parent.parent / "longer" / whole.name)
    shutil.copytree(whole, run.path, symlinks=True)
    done = home.call(f"resume={run.path}")
    assert done.returncode == 1
    assert "is finished at step 24: give a larger trainer.max_steps" in done.stderr
    done = home.call(f"resume={run.path}", "trainer.max_steps=28")
    assert done.returncode == 0, done.stderr
    assert "note: trainer.max_steps was 24 and is 28 from here on" in done.stdout
    assert run.read_summary()["steps"] == 28
    assert [int(row["step"]) for row in home.rows(run.path)] == list(range(1, 29))


def test_init_from_starts_anew_with_the_weights(home, whole: Path) -> None:
    still = ["trainer.max_steps=1", "optimizer.lr=0", "optimizer.adam_lr=0"]
    done = home.call(*home.tiny(f"init_from={whole}", "name=child", *still))
    assert done.returncode == 0, done.stderr
    loaded = checkpoint.load(Run(home.only_run("child")).last)
    parent = checkpoint.load(Run(whole).best)
    assert loaded.meta["parent"] == str(Run(whole).best.resolve()) and loaded.meta["step"] == 1
    assert torch.equal(loaded.model.embed.weight, parent.model.embed.weight)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(home, whole: Path, number: signal.Signals) -> None:
    name = f"interrupted-{number.name}"
    process = home.start(*home.tiny(f"name={name}", ACCUMULATE, "trainer.max_steps=100000"))
    folder = home.path / "outputs" / "train" / name
    while not list(folder.glob("*/metrics.csv")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_SAVED
    run = Run(home.only_run(name))
    step = checkpoint.read_meta(run.last)["step"]
    last = errors.strip().splitlines()[-1]
    assert last == f"interrupted at step {step}, saved; go on with: {PYTHON} -m elara.train resume={run.path}"
    done = home.call(f"resume={run.path}", f"trainer.max_steps={step + 1}")
    assert done.returncode == 0 and f"going on at step {step} in" in done.stdout


def begun(home, whole: Path, name: str, step: int) -> Run:
    """A copy of the whole run as it was at `step`."""
    return Run(copy_as_killed(whole, name, step=step))


def rates(home, run: Run) -> dict[int, float]:
    return {int(row["step"]): float(row["train/lr"]) for row in home.rows(run.path) if row["train/lr"]}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_takes_its_rates_and_decays_from_the_configuration(home, whole: Path, optimizer: str) -> None:
    name = f"rates-{optimizer}"
    steps = ["trainer.max_steps=2", "schedule.warmup=0", f"optimizer={optimizer}"]
    assert home.call(*home.tiny(f"name={name}", *steps)).returncode == 0
    run = Run(home.only_run(name))
    changed = ["optimizer.lr=0.25", "optimizer.weight_decay=0.5", "optimizer.betas=[0.8,0.9]", "trainer.max_steps=5"]
    changed += ["optimizer.momentum=0.7", "optimizer.adam_lr=0.125"] if optimizer == "muon" else []
    done = home.call(f"resume={run.path}", *changed)
    assert done.returncode == 0, done.stderr
    factor = wsd(5, warmup=0, decay=0.6, final=0.0)
    assert [rate for step, rate in rates(home, run).items() if step > 2] == [
        pytest.approx(0.25 * factor(step), rel=1e-8) for step in (2, 3, 4)
    ]
    groups = torch.load(run.last / "trainer.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    adam = [group for group in groups if group.get("kind", "adamw") == "adamw"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in adam)
    assert {group["initial_lr"] for group in adam} == {0.125 if optimizer == "muon" else 0.25}
    assert {group.get("momentum", 0.7) for group in groups} == {0.7}


@pytest.mark.slow
def test_another_optimizer_is_refused_with_what_to_do(home, whole: Path) -> None:
    run = begun(home, whole, "other-optimizer", 16)
    done = home.call(f"resume={run.path}", "optimizer=adamw")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "this run has optimizer=muon, whose state adamw cannot go on with" in done.stderr


@pytest.mark.slow
def test_batches_of_another_size_go_on_where_the_text_was(home, whole: Path) -> None:
    """Twice, as the second change once counted the steps of before in its own size."""
    run = begun(home, whole, "sizes", 16)
    read = [part["windows"] for part in checkpoint.read_meta(run.last)["read"]]
    assert read == [16 * 2 * 4]  # 16 steps of two micro-batches of 4 windows
    for size, micro, last in ((2, 2, 18), (3, 1, 21)):
        options = [f"data.batch_size={size}", f"trainer.accumulate_grad_batches={micro}", f"trainer.max_steps={last}"]
        done = home.call(f"resume={run.path}", *options)
        assert done.returncode == 0, done.stderr
        read.append(checkpoint.read_meta(run.last)["read"][0]["windows"])
    assert read == [128, 128 + 2 * 2 * 2, 128 + 8 + 3 * 3]


@pytest.mark.slow
def test_validations_keep_their_steps_when_the_accumulation_changes(home, whole: Path) -> None:
    run = begun(home, whole, "accumulation", 16)
    done = home.call(f"resume={run.path}", "trainer.accumulate_grad_batches=3", "trainer.val_check_interval=3")
    assert done.returncode == 0, done.stderr
    validated = [int(row["step"]) for row in home.rows(run.path) if row["val/loss_ar"]]
    assert validated == [8, 16, 18, 21, 24]


def texts(home, name: str) -> Path:
    """A folder of its own with the text, to begin a run in."""
    folder = home.path / name
    folder.mkdir()
    shutil.copy(home.text, folder / "own.txt")
    return folder


@pytest.mark.slow
def test_a_text_that_changed_is_refused_unless_accepted(home) -> None:
    file = texts(home, "grow") / "own.txt"
    short = ["trainer.max_steps=2", f"data.path={file}"]
    assert home.call(*home.tiny("name=grow", *short)).returncode == 0
    run = Run(home.only_run("grow"))
    before, more = checkpoint.read_meta(run.last)["text"], [f"resume={run.path}", "trainer.max_steps=3"]
    file.write_text(file.read_text("utf-8")[:4000] * 4, "utf-8")

    done = home.call(*more)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"the training text of this run has changed: {file.resolve()} (" in done.stderr
    assert done.stderr.endswith("go on like this with data.changed=accept\n")

    done = home.call(*more, "data.changed=accept")
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_meta(run.last)["text"] != before
    done = home.call(f"resume={run.path}", "trainer.max_steps=4")
    assert done.returncode == 0, f"what was accepted is the run's text now: {done.stderr}"


@pytest.mark.slow
def test_the_same_text_in_another_place_is_the_same(home, whole: Path) -> None:
    run = begun(home, whole, "moved", 16)
    moved = texts(home, "moved-text") / "own.txt"
    done = home.call(f"resume={run.path}", f"data.path={moved}")
    assert done.returncode == 0, done.stderr
    same_run(home, run.path, whole)


@pytest.mark.parametrize("change", ["seed=2", *some_slow("data.seq=16", "data.cross_documents=false")])
def test_what_would_order_the_text_anew_is_refused(home, whole: Path, change: str) -> None:
    run = begun(home, whole, f"order-{change.partition('=')[0]}", 16)
    done = home.call(f"resume={run.path}", change)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{change.partition('=')[0]} orders the text that this run reads" in done.stderr


@pytest.mark.slow
def test_an_older_checkpoint_does_not_stand_in_for_a_text_that_changed(home, whole: Path) -> None:
    run = begun(home, whole, "no-way-back", 16)
    meta = checkpoint.read_meta(run.last)
    meta["text"][0]["train"]["sha256"] = "0" * 64
    checkpoint.write_json(run.last / "meta.json", meta)
    done = home.call(f"resume={run.path}")
    assert done.returncode == 1 and "the training text of this run has changed" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_from_before_goes_on_by_its_number_of_windows(home, whole: Path) -> None:
    run = begun(home, whole, "from-before", 16)
    meta = checkpoint.read_meta(run.last)
    windows = 16 * 2 * 4
    old = {key: value for key, value in meta.items() if key not in ("read", "text")}
    checkpoint.write_json(run.last / "meta.json", {**old, "windows": windows})
    done = home.call(f"resume={run.path}")
    assert done.returncode == 0, done.stderr
    assert "whether it has changed cannot be checked" in done.stdout
    same_run(home, run.path, whole)


@pytest.mark.slow
def test_relative_paths_lead_from_where_the_run_began(home) -> None:
    folder = texts(home, "began-here")
    command = [*home.tiny("name=relative", "trainer.max_steps=1"), "data.path=own.txt"]
    began = forks.run("elara.train", *command, cwd=folder, env=home.env())
    assert began.returncode == 0, began.stderr
    run = Run(home.only_run("relative"))
    for steps in (2, 3):  # in another folder, twice: what the first resume recorded counts too
        done = home.call(f"resume={run.path}", f"trainer.max_steps={steps}")
        assert done.returncode == 0, done.stderr
        assert "data.path was" not in done.stdout


REFUSED = [
    "data.path=typo.txt", "model.hidden=96", "optimizer=adamw", "optimizer.momentun=0.5", "trainer.max_steps=0",
    "data.changed=perhaps", "callbacks.checkpoint.keep=0",
]  # fmt: skip


@pytest.mark.parametrize("change", [REFUSED[0], *some_slow(*REFUSED[1:])])
def test_a_refused_resume_leaves_no_trace(home, whole: Path, change: str) -> None:
    run = begun(home, whole, f"refused-{change.partition('=')[0]}", 16)
    before = traces(run.path)
    done = home.call(f"resume={run.path}", change)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert traces(run.path) == before
    if change == REFUSED[0]:  # the right command is not taken for the wrong one
        assert home.call(f"resume={run.path}").returncode == 0
        same_run(home, run.path, whole)


def test_a_new_run_in_the_folder_of_another_is_refused_and_leaves_no_trace(home, whole: Path) -> None:
    before = traces(whole)
    done = home.call(*home.tiny("name=whole", "seed=99", f"hydra.run.dir={whole}"))
    assert done.returncode == 1 and f"{whole} holds a run already: go on with resume={whole}" in done.stderr
    assert traces(whole) == before


@pytest.mark.parametrize("change", ["optimizer.lr=-1", "data.path=typo.txt"])
def test_a_refusal_deletes_nothing_of_a_run_that_was_killed_while_it_prepared(home, change: str) -> None:
    folder = home.path / "outputs" / "train" / f"prepared-{change.partition('=')[0]}" / "2026-01-01_00-00-00"
    run = fake_run(folder, home.tiny())
    run.config.unlink()
    before = traces(folder)
    done = home.call(f"resume={folder}", change)
    assert done.returncode == 1 and traces(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folders", *some_slow("files", "alone")])
def test_a_copied_run_goes_on_and_is_found(home, whole: Path, kind: str) -> None:
    """Copies make folders of the links `last` and `best` (scp -r), or files with a name in them (no links there)."""
    run = Run(whole.parent.parent / f"copied-{kind}" / whole.name)
    shutil.copytree(begun(home, whole, f"copy-of-{kind}", 16).path, run.path, symlinks=kind == "files")
    if kind == "files":
        for link in (run.last, run.best):
            name = link.readlink()
            link.unlink()
            link.write_text(f"{name}\n", "utf-8")
    if kind == "alone":
        for folder in run.path.glob("checkpoints/step-*"):
            shutil.rmtree(folder)
    assert checkpoint.read_meta(find_checkpoint(run.path))["step"] == 16
    assert checkpoint.read_meta(find_checkpoint(run.last))["step"] == 16
    done = home.call(f"resume={run.path}")
    assert done.returncode == 0, done.stderr
    same_run(home, run.path, whole)
    assert all(re.fullmatch(r"step-\d+|last|best", path.name) for path in run.last.parent.iterdir())


@pytest.mark.slow
def test_a_hangup_saves_unless_it_is_ignored(home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal of a run on another machine is gone; under nohup that is no news."""
    done = {}
    for kind, before in (("heard", lambda *_: None), ("nohup", signal.SIG_IGN)):
        usual = signal.signal(signal.SIGHUP, before)  # a run that did not listen would go on as well
        hang_up = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGHUP))
        monkeypatch.setattr(Throughput, "on_train_start", lambda *_, timer=hang_up: timer.start(), raising=False)
        try:
            steps = ["trainer.max_steps=60", "trainer.val_check_interval=1000"]
            done[kind] = home.call(*home.tiny(f"name=hangup-{kind}", *steps))
        finally:
            hang_up.join()
            signal.signal(signal.SIGHUP, usual)
    assert done["nohup"].returncode == 0, done["nohup"].stderr
    assert done["heard"].returncode == EXIT_SAVED and f"saved; go on with: {PYTHON} -m" in done["heard"].stderr
    assert Run(home.only_run("hangup-heard")).last.exists()


HOLD = """
import sys
from pathlib import Path
from elara.runs import claim
lock = claim(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def test_two_processes_cannot_train_in_one_folder(home, whole: Path) -> None:
    folder = copy_as_killed(whole, "busy", step=16)
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, env=home.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        before = traces(folder)
        done = home.call("resume=auto", "name=busy", "optimizer.lr=0.5")
        assert traces(folder) == before
        other.kill()
    assert done.returncode == 1 and "another process is training in" in done.stderr


@pytest.mark.slow
def test_what_killed_saves_left_goes_when_the_run_goes_on_and_not_while_another_process_trains(
    home, whole: Path
) -> None:
    run = Run(copy_as_killed(whole, "left-over", step=16))
    checkpoints = run.path / "checkpoints"
    folders = [checkpoints / ".step-24-0123abcd", checkpoints / ".step-8-old-0123abcd"]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
    files = [run.path / ".summary.json.4711", checkpoints / "step-16" / ".meta.json.4711"]
    for file in files:
        file.write_text("{", "utf-8")
    files.append(checkpoints / ".last-0123abcd")
    files[-1].symlink_to("step-16")
    mine = run.path / ".notes.txt"
    mine.touch()

    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, env=home.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert home.call(f"resume={run.path}").returncode == 1
        other.kill()
    assert all(path.is_symlink() or path.exists() for path in (*folders, *files))
    done = home.call(f"resume={run.path}")
    assert done.returncode == 0, done.stderr
    assert not any(path.is_symlink() or path.exists() for path in (*folders, *files)) and mine.exists()
    same_run(home, run.path, whole)


def test_the_trainers_state_holds_no_weights_and_only_plain_values(whole: Path) -> None:
    state = torch.load(Run(whole).last / "trainer.ckpt", weights_only=True)
    assert state["state_dict"] == {}
    assert state["optimizer_states"] and state["elara_random"]


def fake_run(folder: Path, overrides: list[str], precision: str = "bf16-mixed", **summary: object) -> Run:
    run = Run(folder)
    (folder / ".hydra").mkdir(parents=True)
    run.overrides.write_text("\n".join(f"- {text}" for text in overrides) or "[]", "utf-8")
    run.config.write_text(f"trainer: {{precision: {precision}}}\n", "utf-8")
    run.summary.write_text(json.dumps(summary), "utf-8")
    return run


def test_arguments_without_resume_are_left_alone() -> None:
    assert rewrite(["model=elara_tiny", "-m", "resume=null"]) == ["model=elara_tiny", "-m", "resume=null"]


def test_saved_overrides_come_back_and_those_given_now_win(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "r", ["trm.depth=3", "+trainer.fast=1", "resume=auto", "seed=4"])
    arguments = rewrite(["--cfg", "job", f"resume={run.path}", "seed=5"])
    assert arguments[:2] == ["--cfg", "job"]
    assert [key_of(text) for text in arguments[2:]] == [
        "trm.depth", "trainer.fast", "seed", "trainer.precision", "resume", "hydra.run.dir"
    ]  # fmt: skip
    assert "seed=5" in arguments and "trainer.precision=bf16-mixed" in arguments
    assert f"hydra.run.dir='{run.path}'" in arguments


def test_paths_of_teachers_lead_from_where_the_run_began_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = tmp_path / "began"
    (began / "teacher" / "checkpoints").mkdir(parents=True)
    (began / "model").mkdir()
    models = ["teachers.x.backend.model=model", "teachers.y.backend.model=gpt2"]
    keys = ["teachers.elara.backend.checkpoint=teacher", *models, "init_from=model"]  # no checkpoint: the name of a run
    run = fake_run(tmp_path / "r", keys)
    run.hydra.write_text(f"hydra: {{runtime: {{cwd: '{began}'}}}}\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    arguments = rewrite([f"resume={run.path}"])
    assert arguments[:4] == [
        f"teachers.elara.backend.checkpoint='{began / 'teacher'}'", f"teachers.x.backend.model='{began / 'model'}'",
        "teachers.y.backend.model=gpt2", "init_from=model",
    ]  # fmt: skip


def test_a_folder_with_odd_signs_in_its_name_is_quoted(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "it's a, (run)", [])
    again = rewrite(rewrite([f"resume={run.path}"]))
    (place,) = (text for text in again if text.startswith("hydra.run.dir='"))
    assert "it\\'s a, (run)" in place


def test_another_trainer_chooses_its_own_precision(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "r", [])
    keys = [key_of(text) for text in rewrite([f"resume={run.path}", "trainer=ddp_cpu"])]
    assert "trainer.precision" not in keys
