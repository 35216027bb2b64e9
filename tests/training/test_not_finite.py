"""A run whose numbers are none ends with one line, and its last good checkpoint stays."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from lightning import Callback

from elara import checkpoint
from elara.runs import Run

WITHOUT = [f"~callbacks.{name}" for name in ("samples", "acceptance", "monitoring")]  # what takes long
POISON = ["+callbacks.poison._target_=poison.Poison"]


class Poison(Callback):
    """Spoils what is named before the first step, or after a step's validation."""

    def __init__(self, what: str, step: int, value: str) -> None:
        self.what, self.step, self.value = what, step, float(value)

    def on_train_start(self, trainer, module) -> None:
        if self.step == 0:
            self.spoil(module.model)

    def on_validation_end(self, trainer, module) -> None:
        if trainer.global_step == self.step:
            self.spoil(module.model)

    def spoil(self, model) -> None:
        with torch.no_grad():
            if self.what == "weights":
                model.norm.weight[0] = self.value
            elif self.what == "diffusion":
                model.diffusion.weight[0] = self.value
            else:  # too large for the norm, which then clips the step to nothing
                model.norm.weight.register_hook(lambda gradient: gradient * self.value)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    module = ModuleType("poison")
    vars(module)["Poison"] = Poison
    monkeypatch.setitem(sys.modules, "poison", module)


def poison(what, step, value="nan"):
    """value: as a text, which the checks of the configuration leave alone."""
    given = {"what": what, "step": step, "value": f"'{value}'"}
    return [*POISON, *(f"+callbacks.poison.{key}={value}" for key, value in given.items())]


def short(home, *overrides):
    given = ["model.dropout=0", "trainer.max_steps=6", "trainer.val_check_interval=2", *WITHOUT]
    return [text for text in home.tiny(*given, *overrides) if not text.startswith("callbacks.")]


def one_line(done, *words):
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "done:" not in done.stdout


def finite(folder: Path) -> bool:
    meta = checkpoint.read_meta(folder)
    return all(value.isfinite().all() for value in checkpoint.read_weights(folder, meta).values())


def spoil_checkpoint(folder: Path) -> None:
    loaded = checkpoint.load(folder)
    with torch.no_grad():
        loaded.model.norm.weight[0] = float("nan")
    meta = {k: v for k, v in loaded.meta.items() if k not in ("format_version", "tokenizer", "crc32")}
    spoiled = folder.with_name("spoiled")
    checkpoint.save(spoiled, loaded.model, loaded.tokenizer, meta=meta)
    told, there = (json.loads((place / "meta.json").read_text()) for place in (spoiled, folder))
    told["crc32"] = {**there["crc32"], **told["crc32"]}
    (folder / "meta.json").write_text(json.dumps(told))
    shutil.move(spoiled / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(spoiled)


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize(("what", "value", "said", "logged"), [
    ("weights", "nan", "loss", 1), ("weights", "inf", "loss", 1000), ("diffusion", "nan", "loss", 1000),
    ("gradient", "1e30", "train/grad_norm is inf", 1), ("gradient", "1e30", "train/grad_norm is", 1000),
])  # fmt: skip
def test_training_stops_and_the_last_good_checkpoint_stays(home, what, value, said, logged):
    name = f"stops-{what}-{value}-{logged}"
    done = home.call(*short(home, f"name={name}", f"trainer.log_every_n_steps={logged}", *poison(what, 4, value)))
    one_line(done, said, f"at step {5 if logged == 1 else 6}")
    run = Run(home.only_run(name))
    assert [path.name for path in run.checkpoints()] == ["step-4", "step-2"]
    assert run.last.readlink() == Path("step-4")
    assert finite(run.last) and finite(run.best)
    assert not run.finished


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize("others", [WITHOUT, ["callbacks=none", "+trainer.limit_val_batches=0"]])
@pytest.mark.parametrize(("what", "value"), [("weights", "inf"), ("gradient", "1e30")])
def test_however_short_a_run_is(home, what, value, others):
    name = f"short-{what}-{len(others)}"
    tiny = [text for text in home.tiny(f"name={name}", *others) if not text.startswith("callbacks.")]
    short = ["trainer.max_steps=1", "trainer.log_every_n_steps=1000"]
    done = home.call(*tiny, *short, *poison(what, 0, value))
    one_line(done, "at step 1")


@pytest.mark.slow
def test_resuming_passes_by_a_checkpoint_that_is_not_finite(home):
    assert home.call(*short(home, "name=passes")).returncode == 0
    run = Run(home.only_run("passes"))
    before = [path.name for path in run.checkpoints()]
    assert before[0] == "step-6"
    spoil_checkpoint(run.last.resolve())
    done = home.call(f"resume={run.path}", "trainer.max_steps=8")
    assert done.returncode == 0, done.stderr
    assert f"'norm.weight' is nan or infinite in places: take an earlier checkpoint; going back to {before[1]}" in (
        done.stdout
    )
    assert finite(run.last) and run.last.readlink() == Path("step-8")


def test_no_run_begins_from_weights_that_are_not_finite(home):
    assert home.call(*short(home, "name=source")).returncode == 0
    folder = Run(home.only_run("source")).last.resolve()
    spoil_checkpoint(folder)
    one_line(home.call(*short(home, "name=begins", f"init_from={folder}")), str(folder), "nan or infinite")
    assert not list((home.path / "outputs" / "train").glob("begins/*"))


@pytest.fixture(scope="session")
def teachers(session_home):
    """Checkpoints of one run, sound and spoiled."""
    assert session_home.call(*short(session_home, "name=sound_teacher")).returncode == 0
    sound = Run(session_home.only_run("sound_teacher")).last.resolve()
    spoiled = session_home.path / "spoiled-teacher"
    shutil.copytree(sound, spoiled)
    spoil_checkpoint(spoiled)
    return {"sound": sound, "spoiled": spoiled}


def taught(home, name, teacher, *overrides):
    given = ["teacher=[elara]", f"teachers.elara.backend.checkpoint={teacher}", "distill.context=32"]
    return home.call(*short(home, f"name={name}", *given, *overrides))


def stored(home):
    """Folders of what teachers said of a text."""
    return {folder for folder in home.path.glob("data/prepared/*/teachers/*-*") if folder.is_dir()}


@pytest.mark.slow
@pytest.mark.parametrize("opinions", ["stored", "live"])
def test_a_teacher_without_numbers_is_named(home, teachers, opinions):
    before = stored(home)
    done = taught(home, f"taught-{opinions}", teachers["spoiled"], f"distill.opinions={opinions}")
    one_line(done, "teachers.elara says nan")
    assert stored(home) <= before


@pytest.mark.slow
def test_what_an_earlier_version_stored_of_it_is_thrown_away(home, teachers):
    before = stored(home)
    assert taught(home, "taught-well", teachers["sound"]).returncode == 0
    (folder,) = stored(home) - before
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("checked") is True  # it is looked through once
    (folder / "manifest.json").write_text(json.dumps(manifest))
    values = np.fromfile(folder / "logprobs", "<f2")
    values[values.size // 2] = np.nan
    values.tofile(folder / "logprobs")
    one_line(taught(home, "taught-badly", teachers["sound"]), "teachers.elara says nan")
    assert not folder.exists()
