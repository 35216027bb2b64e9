"""Hand TensorBoard and Weights & Biases what is no curve: facts, pictures of the experts, checkpoints, how it ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, Trainer
from numpy.typing import NDArray

from elara.errors import EXIT_ERROR, EXIT_INTERRUPTED, Interrupted, never_fatal
from elara.report.metrics import points, read_metrics
from elara.runs import Run, followed
from elara.size import count_parameters
from elara.training.callbacks.summary import commit, hardware, versions
from elara.training.loggers import Monitor

FIRST_GUESS = 2.0  # seconds that the first picture is expected to take, most of them for importing matplotlib
LOSS = "val/loss_ar"


class Monitoring(Callback):
    """Does nothing where only the csv is written. Pictures are drawn from it.

    Args:
        folder: the run folder.
        share: largest share of the wall time that pictures may take; the last validation has one in any case.
    """

    def __init__(self, folder: str, share: float = 0.02) -> None:
        self.run = Run(Path(folder))
        self.share = share
        self._monitors: list[Monitor] = []
        self._due = 0.0
        self._drawn = -1  # step of the newest picture

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        self._monitors = [logger for logger in trainer.loggers if isinstance(logger, Monitor)]
        self._due = self._next(FIRST_GUESS)
        for monitor in self._monitors:
            monitor.resumed_step = module.resumed_step
            monitor.more_follows = stage != "fit"
        if stage != "fit" or not self._monitors:
            return
        parts = count_parameters(module.model).values()  # now: a strategy may shard the model soon
        facts = {
            "parameters": {"total": sum(p.total for p in parts), "active": sum(p.active for p in parts)},
            "hardware": hardware(),
            "world_size": trainer.world_size,
            "versions": versions(),
            "commit": commit(),
        }
        for monitor in self._monitors:
            monitor.log_facts(facts)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if not self._monitors:
            return
        if time.monotonic() >= self._due and self.run.metrics.exists():
            with never_fatal("drawing pictures of the experts"):
                self._draw(module.step)
        folder = self.run.path / "checkpoints" / f"step-{module.step}"
        if folder.is_dir():
            best = ["best"] if followed(self.run.best) == folder else []
            with never_fatal(f"handing over the checkpoint {folder.name}"):
                self._keep(folder, "all", best)
        for monitor in self._monitors:
            monitor.save()  # the checkpoint lies before this validation: it is not going to be repeated

    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        if self._monitors and self.run.metrics.exists():
            if self._drawn != module.step:
                with never_fatal("drawing pictures of the experts"):
                    self._draw(module.step)
            with never_fatal("handing over the best figures"):
                for monitor in self._monitors:
                    monitor.log_best(self._lowest())
        if self.run.best.exists():
            with never_fatal("handing over the best checkpoint"):
                self._keep(followed(self.run.best), "best", ["best"])
        for monitor in self._monitors:
            print(monitor.hint, flush=True)

    def on_exception(self, trainer: Trainer, module: Any, exception: BaseException) -> None:
        for monitor in self._monitors:
            if isinstance(exception, Interrupted):
                monitor.exit_code = exception.exit_code
            else:
                monitor.exit_code = EXIT_INTERRUPTED if isinstance(exception, KeyboardInterrupt) else EXIT_ERROR

    def _keep(self, folder: Path, wanted: str, names: list[str]) -> None:
        for monitor in self._monitors:
            if monitor.checkpoints == wanted:
                monitor.log_checkpoint(folder, [*names, folder.name])

    def _lowest(self) -> dict[str, float]:
        """The best validation so far, those before a resume included."""
        losses = points(read_metrics(self.run.metrics, {LOSS}.__contains__), LOSS)[1]
        return {LOSS: float(losses.min())} if len(losses) else {}

    def _draw(self, step: int) -> None:
        begin = time.monotonic()
        for name, pixels in expert_pictures(self.run.metrics).items():
            for monitor in self._monitors:
                monitor.log_picture(name, pixels, step)
        self._drawn = step
        self._due = self._next(time.monotonic() - begin)

    def _next(self, taken: float) -> float:
        """When the next picture may be drawn, if one takes so many seconds: with a share of 1, at once."""
        return time.monotonic() + taken * (1 - self.share) / max(self.share, 1e-6)


def expert_pictures(metrics: Path) -> dict[str, NDArray[np.uint8]]:
    """Load and imbalance of the experts over the steps, (height, width, 3) each; none for a model without experts."""
    import matplotlib  # takes a second to import: not before it is needed
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from elara.report.figures import panels
    from elara.report.style import STYLE

    pictures = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        found = panels(read_metrics(metrics, lambda name: name.startswith("moe/"))).get("experts", [])
        for name, panel in zip(("expert_load", "max_vio"), found, strict=False):
            canvas = FigureCanvasAgg(Figure(figsize=panel.size, layout="constrained"))
            panel.draw(canvas.figure)
            canvas.draw()
            pictures[name] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return pictures
