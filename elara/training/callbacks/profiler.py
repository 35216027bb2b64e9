"""Record a window of steps with torch.profiler: a trace, a table, a picture."""

from __future__ import annotations

import statistics
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

from elara.data.batches import Batch
from elara.device import device_name
from elara.errors import ElaraError, never_fatal
from elara.training import profiling


class StepProfiler(Callback):
    """Writes profile/trace.json.gz, table.txt, table.csv and parts.png into the run folder.

    Outside of its window it costs nothing. The window opens between two steps and closes behind `steps` whole ones, or
    ahead of a validation.

    Args:
        folder: the run folder.
        wait: optimizer steps before the window, until kernels and caches are warm.
        steps: optimizer steps in it.
    """

    def __init__(self, folder: str, wait: int = 20, steps: int = 10) -> None:
        if wait < 2 or steps < 1:
            raise ElaraError(f"profiler.wait={wait} and profiler.steps={steps} must be at least 2 and 1")
        self.path = Path(folder) / "profile"
        self.wait, self.steps = wait, steps
        self._seen = 0  # steps since training began or went on
        self._first = 0  # step of the window
        self._begin = 0.0  # of the step or of the window
        self._plain: deque[float] = deque(maxlen=10)  # seconds of the newest steps before it
        self._profile: Any = None
        self._ranges = ExitStack()
        self._done = False

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self._done or not trainer.is_global_zero or not module.step_ends(batch_idx):
            return
        self._seen += 1
        validates = module.validates(batch_idx)
        if self._profile is not None:
            if validates or trainer.global_step + 1 - self._first >= self.steps:
                self._close(trainer, module)
            return
        now = _now()
        if self._seen > 1:
            self._plain.append(now - self._begin)
        self._begin = now
        if self._seen >= self.wait and not validates and trainer.global_step != trainer.max_steps:
            self._open(trainer, module)

    def _open(self, trainer: Trainer, module: Any) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._first = trainer.global_step + 1
        self._ranges.enter_context(profiling.attach(module.model))
        self._ranges.callback(setattr, trainer, "profiler", trainer.profiler)  # type: ignore[attr-defined]
        trainer.profiler = profiling.Actions()  # type: ignore[attr-defined]
        self._profile = profile(activities=activities)
        self._profile.start()
        self._begin = _now()

    def _close(self, trainer: Trainer, module: Any) -> None:
        seconds, steps = _now() - self._begin, trainer.global_step + 1 - self._first
        self._ranges.close()
        self._profile.stop()
        found, self._profile, self._done = self._profile, None, True
        on = f"{device_name(module.device)}, {trainer.precision}"
        if module.device.type == "cpu":
            on += f", threads: {torch.get_num_threads()}"
        plain = statistics.median(self._plain)
        with never_fatal("writing the profile"):
            self.path.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(self.path / "trace.json.gz"))
            profiling.write(profiling.measured(found.events(), steps, self._first, seconds, plain, on), self.path)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        if self._profile is not None:
            self._close(trainer, module)
        if self._done:
            print(f"profile of the step: {self.path}/table.txt; trace.json.gz opens in ui.perfetto.dev", flush=True)
        else:
            print(f"no profile: the run ended within profiler.wait={self.wait} steps", flush=True)

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._ranges.close()
        if self._profile is not None:
            self._profile.stop()
            self._profile = None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
