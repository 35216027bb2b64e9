"""A progress bar for long preparations: nothing for what is done within a second, plain lines outside a terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PATIENCE = 1.0  # seconds before anything is shown
PLAIN_EVERY = 60.0  # seconds between lines outside a terminal


class Progress:
    """Counts units of work on stderr."""

    def __init__(self, label: str, unit: str, total: int | None = None, done: int = 0) -> None:
        self._label, self._unit, self._total, self._done = label, unit, total, done
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._next = time.monotonic() + (PATIENCE if self._console.is_terminal else PLAIN_EVERY)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """So many units more are done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, amount=self._amount())
        elif time.monotonic() >= self._next:
            self._show()

    def _show(self) -> None:
        if self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")
            self._bar = RichProgress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True
            )
            self._bar.add_task(self._label, total=self._total, completed=self._done, amount=self._amount())
            self._bar.start()
        else:
            print(f"{self._label}: {self._amount()}", file=sys.stderr, flush=True)
            self._next = time.monotonic() + PLAIN_EVERY

    def _amount(self) -> str:
        return f"{self._done:,}" + ("" if self._total is None else f" of {self._total:,}") + f" {self._unit}"
