"""What Lightning, our callbacks and the log cost: the quick run's step against a bare loop over the same module.

Both run in one thread and take turns: behind every `CHUNK` steps a callback halts the Lightning run and lets the bare
loop do as many, so that never both compute and a busy machine disturbs them alike. Both see the same batches and draw
the same mask sections, and in the end their weights must be equal bit for bit: they did the same work.
"""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from elara.bench.measure import Figure, figure
from elara.data.batches import Batch
from elara.errors import ElaraError
from elara.training.module import ElaraModule
from elara.training.parts import Parts
from elara.training.run import build, hush, resolved

CHUNK = 10  # steps; one row of the log falls into each of the Lightning run's
WARM_UP = 2  # chunks that do not count


def overhead(rounds: int, device: torch.device, *overrides: str) -> Iterator[Figure]:
    """Seconds of `CHUNK` steps, Lightning's over the bare loop's. overrides: further ones of the quick run."""
    hush()
    with TemporaryDirectory() as folder, _home(folder):
        steps = CHUNK * (WARM_UP + rounds + 1)  # the last chunk ends with a checkpoint, which is no step
        parts = _quick_run(Path(folder), steps, device, *overrides)
        turns = Turns(Bare(deepcopy(parts.module), parts))
        parts.trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        with redirect_stdout(io.StringIO()):  # of the progress line
            parts.trainer.fit(parts.module, datamodule=parts.data)
        _check_equal(parts.module, turns.bare.module)
    tokens = parts.data.data.batch_size * parts.data.seq
    for clock, ours, bare in (("", turns.lightning, turns.alone), (", CPU time", turns.lightning_cpu, turns.alone_cpu)):
        found = figure(
            f"step through Lightning / bare loop{clock}", ours[WARM_UP:-1], bare[WARM_UP:-1], target=1.05,
            note=f"{parts.trainer.precision}, {CHUNK} steps of {tokens} tokens in turn, a log row each",
        )  # fmt: skip
        found.tokens_per_second = CHUNK * tokens / found.subject
        yield found


class Bare:
    """The loop one writes without a framework: loss, backward, clipping, optimizer, schedule, balance."""

    def __init__(self, module: ElaraModule, parts: Parts) -> None:
        self.module, self.step = module, 0
        self.limit = float(parts.trainer.gradient_clip_val or 0.0)
        self.narrow = parts.trainer.precision == "bf16-mixed"
        # what the module asks its trainer
        self.at = SimpleNamespace(global_rank=0, world_size=1, global_step=0, accumulate_grad_batches=1)
        module.trainer = self.at  # type: ignore[assignment]
        made: Any = module.configure_optimizers()
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.batches = iter(parts.data.train_dataloader())

    def run(self, steps: int, device: torch.device) -> None:
        """Train so many steps."""
        self.module.to(device).train()
        for _ in range(steps):
            batch = Batch(next(self.batches).tokens.to(device, non_blocking=True))
            with torch.autocast(device.type, torch.bfloat16, enabled=self.narrow):
                loss = self.module.training_step(batch, self.at.global_step)
            self.optimizer.zero_grad()
            loss.backward()
            if self.limit:
                torch.nn.utils.clip_grad_norm_(self.module.model.parameters(), self.limit)
            self.optimizer.step()
            self.schedule.step()
            self.module.balancer.step()
            self.at.global_step += 1


class Turns(lightning.Callback):
    """Behind every `CHUNK` steps of the trainer: the bare loop's turn. Keeps the seconds of both, by either clock."""

    def __init__(self, bare: Bare) -> None:
        self.bare = bare
        self.lightning: list[float] = []
        self.lightning_cpu: list[float] = []
        self.alone: list[float] = []
        self.alone_cpu: list[float] = []
        self._since = (0.0, 0.0)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._since = _clocks()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if (batch_idx + 1) % CHUNK:
            return
        halted = _clocks()
        self.bare.run(CHUNK, module.device)
        end = _clocks()
        for kept, first, last in (
            (self.lightning, self._since[0], halted[0]), (self.lightning_cpu, self._since[1], halted[1]),
            (self.alone, halted[0], end[0]), (self.alone_cpu, halted[1], end[1]),
        ):  # fmt: skip
            kept.append(last - first)
        self._since = _clocks()


def _clocks() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _quick_run(folder: Path, steps: int, device: torch.device, *overrides: str) -> Parts:
    """Data, model and trainer of `python -m elara.train` on a made-up text, without validation."""
    text = folder / "text.txt"
    letters = random.Random(0).choices("etaoin shrdlu\n", k=300_000)
    text.write_text("".join(letters), "utf-8")
    wanted = [
        "data=text", f"data.path={text}", f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "+trainer.limit_val_batches=0",
        f"trainer.log_every_n_steps={CHUNK}", f"hydra.runtime.output_dir={folder / 'run'}", *overrides,
    ]  # fmt: skip
    config = compose("train", overrides=wanted, return_hydra_config=True)
    with _hydra(config):
        with open_dict(config):
            del config["hydra"]
        lightning.seed_everything(config.seed, verbose=False)
        return build(config, resolved(config))


@contextmanager
def _hydra(config: DictConfig) -> Iterator[None]:
    """Let the run's interpolations find its own folder instead of the bench's."""
    instance = HydraConfig.instance()
    before, instance.cfg = instance.cfg, None
    instance.set_config(deepcopy(config))
    try:
        yield
    finally:
        instance.cfg = before


@contextmanager
def _home(folder: str) -> Iterator[None]:
    """Prepared data goes into `folder`, not beside the user's."""
    before = os.environ.get("ELARA_HOME")
    os.environ["ELARA_HOME"] = folder
    try:
        yield
    finally:
        os.environ.pop("ELARA_HOME")
        if before is not None:
            os.environ["ELARA_HOME"] = before


def _check_equal(one: ElaraModule, other: ElaraModule) -> None:
    weights = dict(other.model.state_dict())
    for name, value in one.model.state_dict().items():
        if not torch.equal(value, weights[name]):
            raise ElaraError(f"the two loops of case lightning did not do the same work: {name} differs")
