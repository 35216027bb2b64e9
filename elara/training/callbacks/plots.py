"""Draw the run's pictures when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from elara.errors import never_fatal
from elara.runs import Run


class Plots(Callback):
    """plots/*.png from metrics.csv: loss curves, expert load, draft acceptance. Needs the csv logger."""

    def __init__(self, folder: str, title: str) -> None:
        self.run = Run(Path(folder))
        self.title = title

    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        if not trainer.is_global_zero or not self.run.metrics.exists():
            return
        with never_fatal("drawing the run's pictures"):
            from elara.report.figures import draw_all  # matplotlib takes a second to import: not before it is needed

            draw_all(self.run.metrics, self.run.plots, self.title)
