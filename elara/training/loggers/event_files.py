"""TensorBoard's event files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from elara.errors import ElaraError
from elara.runs import shown
from elara.training.loggers.monitor import Monitor

COMPARED_BY = "val/loss_ar"  # the figure beside the settings in the tab HPARAMS
NOT_COMPARED = ("name", "resume", "logger", "callbacks")  # groups of settings that are left out there


def tensorboard(folder: str) -> TensorBoard:
    """Event files in `folder`; look at them with `tensorboard --logdir`. Raises ElaraError without the package."""
    if find_spec("tensorboard") is None:
        raise ElaraError("logger=tensorboard needs the package tensorboard: pip install 'elara-hivemind[tensorboard]'")
    return TensorBoard(folder)


class TensorBoard(Monitor):
    """Curves, settings, pictures and samples in TensorBoard's event files.

    A resumed run goes on in the same folder, and what was logged behind its checkpoint is taken back (`purge_step`),
    so that no step appears twice.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self._settings: dict[str, Any] = {}
        self._open: Any = None
        self._session_end: Any = None

    @property
    def name(self) -> str:
        return "tensorboard"

    @property
    def version(self) -> str:
        return ""

    @property
    def hint(self) -> str:
        return f"look at the curves: tensorboard --logdir {shlex.quote(shown(Path(self.folder)))}"

    @property
    def writer(self) -> Any:
        """The SummaryWriter, made when the first figure comes: only then it is known where training goes on."""
        if self._open is None:
            from torch.utils.tensorboard import SummaryWriter  # tensorboard is an extra, and slow to import

            self._open = SummaryWriter(self.folder, purge_step=self.resumed_step + 1 if self.resumed_step else None)
            if self._settings:
                self._write_settings()
        return self._open

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._settings = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        self.writer.add_text("facts", _as_code(_yaml(facts)), self.resumed_step)

    def log_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        texts = [f"[{prompt}]{text}" if prompt else text for prompt, text in samples]
        self.writer.add_text("samples", "\n\n".join(_as_code(text) for text in texts), step)

    @rank_zero_only
    def save(self) -> None:
        if self._open is not None:
            self._open.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._open is None or (self.more_follows and status == "success"):
            return
        if status == "success" and self._session_end is not None:
            self._open._get_file_writer().add_summary(self._session_end)
        self._open.close()
        self._open = None

    def _write_settings(self) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._open.add_text("config", _as_code(_yaml(self._settings)), self.resumed_step)
        compared = {key: value for key, value in self._settings.items() if key not in NOT_COMPARED}
        experiment, begin, self._session_end = hparams(_flat(compared), {COMPARED_BY: 0.0})
        for summary in (experiment, begin):
            self._open._get_file_writer().add_summary(summary)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, float | str]:
    """Settings by dotted key; what TensorBoard's table cannot hold, as text."""
    found: dict[str, float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            found[prefix + key] = value if number else str(value)
    return found


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is: every line indented by a tab."""
    return "\n".join("\t" + line for line in text.split("\n"))
