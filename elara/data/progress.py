"""A progress line for long preparations: nothing for what is done within a second."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Counts units of work on stderr; the bar appears after a second."""

    def __init__(self, label: str, unit: str, total: int | None = None, done: int = 0) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]} " + unit),
            TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._done, self._total = done, total
        self._task = self._bar.add_task(label, total=total, completed=done, amount=self._amount())
        self._start, self._shown = time.monotonic(), False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        self._done += amount
        if not self._shown and time.monotonic() - self._start > 1:
            self._shown = True
            self._bar.start()
        if self._shown:
            self._bar.update(self._task, completed=self._done, amount=self._amount())

    def _amount(self) -> str:
        return f"{self._done:,}" + ("" if self._total is None else f"/{self._total:,}")
