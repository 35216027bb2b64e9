"""Whatever happens to a run on its way, its weights and the windows it has read are those of a run without kills.

Random sequences of: train some steps, be killed or asked to stop, change a setting, be refused one, be copied, go on.
The reference takes the same steps with the same settings and is never killed. Which windows a run reads, and at which
rate it learns, is computed here a second time, in plain loops.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import zlib
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer

from elara import checkpoint
from elara.data import TokenFile
from elara.data.batches import Batch, epoch_offset, permutation
from elara.errors import EXIT_SAVED
from elara.runs import Run
from elara.training.schedules import wsd
from tests.conftest import TINY, Home, make_text, traces

SEQ = 32
QUIET = [f"~callbacks.{name}" for name in ("samples", "acceptance", "plots", "monitoring", "throughput")]
FIRST: dict[str, Any] = {
    "trainer.max_steps": 12,
    "trainer.val_check_interval": 5,
    "trainer.accumulate_grad_batches": 1,
    "data.batch_size": 4,
    "optimizer.lr": 0.02,
    "schedule.warmup": 3,
    "schedule.decay": 0.6,
}
MAY_CHANGE: dict[str, list[Any]] = {
    "trainer.max_steps": [11, 12, 13, 15],
    "trainer.val_check_interval": [2, 3, 4, 5],
    "trainer.accumulate_grad_batches": [1, 2, 3],
    "trainer.gradient_clip_val": [0.1, 1.0],
    "data.batch_size": [2, 3, 4, 5, 7],
    "optimizer.lr": [0.005, 0.01, 0.02],
    "optimizer.adam_lr": [0.001, 0.004],
    "optimizer.weight_decay": [0.0, 0.1],
    "optimizer.momentum": [0.8, 0.95],
    "schedule.warmup": [0, 3, 6],
    "schedule.decay": [0.2, 0.6],
    "model.dropout": [0.0, 0.2],
    "moe.bias_update_rate": [0.001, 0.05],
    "tidar.block_fraction": [0.25, 0.5],
}
MAY_NOT = [
    "seed=7", "data.seq=16", "model.hidden=96", "optimizer=adamw", "data.path=typo.txt", "optimizer.momentun=0.5",
    "tokenizer=byte", "trainer.max_steps=0",
]  # fmt: skip


class Fate(Callback):
    """Writes down which windows every step reads, and ends the process in a step: `killed`, `shot` or `asked`.

    killed: after the step, its saves and validation included; shot: at any moment from its beginning on.
    """

    def __init__(self, log: str, step: int = 0, end: str = "") -> None:
        self.file, self.step, self.end = Path(log), step, end

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        step = trainer.global_step + 1
        rows = [zlib.crc32(row.tobytes()) for row in batch.tokens.numpy()]
        with open(self.file, "a", encoding="utf-8") as log:
            log.write(json.dumps([step, os.getpid(), rows]) + "\n")
        if step != self.step or not module.step_ends(batch_idx):
            return
        if self.end == "asked":
            signal.raise_signal(signal.SIGTERM)
        elif self.end == "shot":
            threading.Timer(random.uniform(0, 0.1), os.kill, (os.getpid(), signal.SIGKILL)).start()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.end == "killed" and trainer.global_step == self.step and module.step_ends(batch_idx):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if self.end == "shot":
            os.kill(os.getpid(), signal.SIGKILL)  # the shot would come too late


def train_here(arguments: list[str], home: str, output: str) -> None:
    """What `python -m elara.train` does, in a process that has imported everything already."""
    from elara import train

    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["ELARA_HOME"] = home
    os.environ.pop("HYDRA_FULL_ERROR", None)
    os.chdir(home)
    sys.argv = ["train.py", *arguments]
    train.main()


@pytest.fixture(scope="session")
def warm() -> ForkServerContext:
    """Starts processes that need no seconds to import torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["elara.training.run", "elara.training.callbacks", "elara.report", __name__])
    return context


@dataclass
class Life:
    """A run and what has happened to it. segments: (first step, settings from there on), as they count in the end."""

    warm: ForkServerContext
    home: Home
    name: str
    settings: dict[str, Any] = field(default_factory=lambda: dict(FIRST))
    segments: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    folder: Path | None = None
    output: str = ""

    @property
    def log(self) -> Path:
        return self.home.path / f"{self.name}.log"

    def process(self, *overrides: str, step: int = 0, end: str = "") -> int:
        """Begin or go on with the run; returns the exit code and keeps what was said."""
        output = self.home.path / f"{self.name}.txt"
        fate = f"+callbacks.fate={{_target_: {__name__}.Fate, log: '{self.log}', step: {step}, end: '{end}'}}"
        start = [*TINY, *QUIET, f"data.path={self.home.text}", f"name={self.name}"]
        place = start if self.folder is None else [f"resume={self.folder}"]
        settings = [f"{key}={value}" for key, value in self.settings.items()]
        given = [text for text in place if text.partition("=")[0] not in self.settings]
        arguments = [*given, *settings, fate, *overrides]
        process = self.warm.Process(target=train_here, args=(arguments, str(self.home.path), str(output)))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "the run hangs"
        self.output = output.read_text("utf-8")
        if self.folder is None:
            self.folder = self.home.only_run(self.name)
        return process.exitcode

    def go(self, step: int = 0, end: str = "") -> None:
        """One leg of the way, to its end."""
        code = self.process("callbacks.checkpoint.every_n_steps=2", step=step, end=end)
        wanted = {"killed": -signal.SIGKILL, "shot": -signal.SIGKILL, "asked": EXIT_SAVED, "": 0}[end]
        assert code == wanted, self.output
        found = re.search(r"going on at step (\d+) in", self.output)
        begun = int(found[1]) if found else 0
        self.segments = [part for part in self.segments if part[0] < begun]
        if not self.segments or self.segments[-1][1] != self.settings:
            self.segments.append((begun, dict(self.settings)))

    def saved(self) -> int:
        """The step that the run would go on from."""
        assert self.folder is not None
        found = Run(self.folder).checkpoints()
        return int(found[0].name.removeprefix("step-")) if found else 0

    def meta(self) -> dict[str, Any]:
        assert self.folder is not None
        return checkpoint.read_meta(Run(self.folder).last)


def live(life: Life, chance: random.Random) -> None:
    """A random way to the last step."""
    for _ in range(chance.randint(2, 4)):
        saved = life.saved() if life.folder else 0
        last = life.settings["trainer.max_steps"]
        if saved >= last - 1:
            break
        step = chance.randint(saved + 1, min(saved + 5, last - 1))
        life.go(step, chance.choice(["killed", "shot", "asked"]))
        assert life.folder is not None

        if chance.random() < 0.3 and life.saved():
            before = traces(life.folder)
            assert life.process(chance.choice(MAY_NOT)) == 1, life.output
            assert traces(life.folder) == before, "a refused command leaves no trace"
        if chance.random() < 0.3:
            links = chance.random() < 0.5
            copy = life.folder.parent.parent / f"{life.folder.parent.name}-copy" / life.folder.name
            life.folder = Path(shutil.copytree(life.folder, copy, symlinks=links))
        if chance.random() < 0.7:
            key = chance.choice(list(MAY_CHANGE))
            value = chance.choice(MAY_CHANGE[key])
            if key != "trainer.max_steps" or value > life.saved():
                life.settings[key] = value
    if life.saved() < life.settings["trainer.max_steps"]:
        life.go()


def without_kills(life: Life, reference: Life) -> None:
    """The same steps with the same settings; where those change, the run is asked to stop and goes on."""
    ends = [*(begun for begun, _ in life.segments[1:]), 0]
    for (_, settings), end in zip(life.segments, ends, strict=True):
        reference.settings = dict(settings)
        if end and end < settings["trainer.max_steps"]:
            reference.go(end, "asked")
        else:
            reference.go()


def windows_read(tokens: TokenFile, segments: list[tuple[int, dict[str, Any]]], last: int) -> tuple[list[Any], Any]:
    """Of every step the windows that it reads, and the (epoch, windows) behind the last one."""
    epoch, at, steps = 0, 0, []
    count = (len(tokens) - SEQ) // SEQ
    for step in range(1, last + 1):
        settings = [some for begun, some in segments if begun < step][-1]
        rows: list[int] = []
        for _ in range(settings["trainer.accumulate_grad_batches"]):
            size = settings["data.batch_size"]
            if count - at < size:
                epoch, at = epoch + 1, 0
            starts = permutation(count, 1, epoch)[at : at + size] * SEQ + epoch_offset(SEQ, 1, epoch)
            rows += [zlib.crc32(np.array(tokens.tokens[s : s + SEQ + 1], np.int64).tobytes()) for s in starts]
            at += size
        steps.append(rows)
        if count - at < size:
            epoch, at = epoch + 1, 0
    return steps, {"epoch": epoch, "windows": at}


def traced(log: Path, last: int) -> list[list[int]]:
    """Of every step the windows that the last process to take it read."""
    steps: dict[int, tuple[int, list[int]]] = {}
    for line in log.read_text("utf-8").splitlines():
        step, process, rows = json.loads(line)
        before = steps.get(step, (process, []))
        steps[step] = (process, [*before[1], *rows] if before[0] == process else rows)
    return [steps[step][1] for step in range(1, last + 1)]


def figures(home: Home, life: Life) -> list[dict[str, str]]:
    """The rows of a run's metrics, without validations at which the settings change: one may have been made with those
    before or, where the run was killed before its figures were written, made up for with those behind."""
    assert life.folder is not None
    changes = {str(begun) for begun, _ in life.segments}
    rows = home.rows(life.folder)
    return [{k: v for k, v in row.items() if row["step"] not in changes or "val/" not in k} for row in rows]


@pytest.fixture(scope="session")
def small_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """With a text that is read whole several times in a dozen steps."""
    path = tmp_path_factory.mktemp("sequences")
    text = path / "bees.txt"
    text.write_text(make_text(2400, seed=3), "utf-8")
    return Home(path, text)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=pytest.mark.slow if n < 10 else pytest.mark.long) for n in range(200)]
)
def test_a_run_is_what_its_steps_were(warm: ForkServerContext, small_home: Home, seed: int) -> None:
    life, reference = Life(warm, small_home, f"life-{seed}"), Life(warm, small_home, f"reference-{seed}")
    live(life, random.Random(seed))
    without_kills(life, reference)
    assert life.folder is not None and reference.folder is not None
    last = life.settings["trainer.max_steps"]

    one, other = (checkpoint.load(Run(path).last).model.state_dict() for path in (life.folder, reference.folder))
    assert all(torch.equal(one[name], other[name]) for name in one), life.segments
    assert life.meta()["step"] == reference.meta()["step"] == last
    assert figures(small_home, life) == figures(small_home, reference)

    (prepared,) = [  # a refused tokenizer leaves prepared text too
        file.parent
        for file in (small_home.path / "data" / "prepared").glob("*/manifest.json")
        if json.loads(file.read_text("utf-8"))["tokenizer"]["fingerprint"] == life.meta()["tokenizer"]
    ]
    steps, read = windows_read(TokenFile(prepared, "train"), life.segments, last)
    assert traced(life.log, last) == steps
    assert life.meta()["read"] == [read]

    for row in small_home.rows(life.folder):
        step, settings = int(row["step"]), [some for begun, some in life.segments if begun < int(row["step"])][-1]
        last, warmup, decay = (settings[key] for key in ("trainer.max_steps", "schedule.warmup", "schedule.decay"))
        factor = wsd(last, warmup=warmup, decay=decay, final=0.0)
        assert float(row["train/lr"]) == pytest.approx(settings["optimizer.lr"] * factor(step - 1), rel=1e-7)
