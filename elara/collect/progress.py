"""How far the teachers are: a bar each with rate and time left; outside a terminal a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from elara.collect.asking import Teacher

FIRST, EVERY = 10.0, 60.0  # seconds until the first line, and between lines, outside a terminal


class Bars:
    """Shown on stderr while it is entered; `tick` brings it up to date."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self._teachers = teachers
        self._console = Console(stderr=True, highlight=False)
        self._next = time.monotonic() + FIRST
        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[state]}"),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._tasks = [self._bars.add_task(t.name, total=None, state="") for t in teachers]

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def tick(self) -> None:
        for task, teacher in zip(self._tasks, self._teachers, strict=True):
            if teacher.started is not None:
                done = len(teacher.prompts) - teacher.open
                self._bars.update(task, total=len(teacher.prompts), completed=done, state=_state(teacher))
        if not self._console.is_terminal and time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            for teacher in self._teachers:
                if teacher.started is not None and teacher.open and teacher.dropped is None:
                    self.say(f"{teacher.name}: {_state(teacher)}")

    def say(self, line: str) -> None:
        """A line above the bars."""
        if self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _state(teacher: Teacher) -> str:
    """`120 of 200, 3 failed, 2.1/s, 0:00:38 left`; the rate is that of this run."""
    assert teacher.started is not None
    done = teacher.answered + teacher.failed.total()
    rate = done / max(1e-9, time.monotonic() - teacher.started)
    parts = [f"{teacher.before + teacher.answered:,} of {len(teacher.prompts):,}"]
    if teacher.failed:
        parts.append(f"{teacher.failed.total():,} failed")
    if teacher.dropped is not None:
        return ", ".join([*parts, "dropped"])
    if done:
        minutes, seconds = divmod(round(teacher.open / rate), 60)
        left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        parts += [f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min", left]
    return ", ".join(parts)
