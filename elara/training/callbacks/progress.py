"""What the user sees while it trains: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning import Callback, Trainer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from elara.data.batches import Batch
from elara.report.measures import clock


class Progress(Callback):
    """Step, losses, speed and time left. Reads only figures that are logged anyway, so it costs nothing per step.

    Args:
        every: seconds between plain lines where stdout is not a terminal.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self._live: Live | None = None
        self._begin = self._shown = 0.0
        self._first_step = 0
        self._away = 0.0  # seconds spent in validation since the begin
        self._left = 0.0

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._begin = self._shown = time.monotonic()
        self._first_step = trainer.global_step
        if sys.stdout.isatty():
            self._live = Live(Text(""), console=Console(), refresh_per_second=4, transient=True)
            self._live.start()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not trainer.is_global_zero or not module.step_ends(batch_idx):
            return
        now = time.monotonic()
        if self._live is not None:
            if now - self._shown > 0.25:
                self._shown = now
                self._live.update(Text(self._line(trainer, module, now)))
        elif now - self._shown > self.every:
            self._shown = now
            print(self._line(trainer, module, now), flush=True)

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self._left = time.monotonic()

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._away += time.monotonic() - self._left
        line = f"step {module.step}  " + figures_line(module.latest, "val")
        if self._live is not None:
            self._live.console.print(Text(line))
        else:
            print(line, flush=True)

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, trainer: Trainer, module: Any, now: float) -> str:
        step, total = trainer.global_step, trainer.max_steps
        rate = (step - self._first_step) / max(now - self._begin - self._away, 1e-9)
        parts = [f"step {step}/{total}" if total > 0 else f"step {step}", figures_line(module.latest, "train")]
        if "train/tokens_per_second" in module.latest:
            parts.append(f"{module.latest['train/tokens_per_second']:,.0f} tokens/s")
        if total > 0 and rate > 0:
            parts.append(f"{clock((total - step) / rate)} left")
        return "  ".join(part for part in parts if part)


def figures_line(figures: dict[str, float], section: str) -> str:
    """`train loss 1.812 (ar 1.602, diffusion 0.420)` from the newest figures; "" while there are none."""
    if f"{section}/loss" not in figures:
        return ""
    start = f"{section}/loss_"  # the heads', then the teachers'
    inside = [f"{name.removeprefix(start)} {value:.3f}" for name, value in figures.items() if name.startswith(start)]
    line = f"{section} loss {figures[f'{section}/loss']:.3f}"
    return f"{line} ({', '.join(inside)})" if len(inside) > 1 else line
