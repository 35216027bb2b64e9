"""The one exception family for mistakes that the user can mend, and the exit codes of the commands."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

EXIT_ERROR = 1
EXIT_SAVED = 75  # EX_TEMPFAIL: interrupted behind a checkpoint; a scheduler may start the same command again
EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C
EXIT_UNREAD = 141  # what a shell reports for a program whose output nobody reads any more, as in `| head`


class ElaraError(Exception):
    """Bad input or state: one sentence that says what was wrong and what to do next."""


class NotFinite(ElaraError):
    """A model whose weights are, or whose forward gives, what is no number: nan or infinite.

    What knows tensors only raises it; whoever knows where the model came from puts that in front with `naming`.
    """

    def __init__(self, message: str = "the model computes nan or infinite numbers: take an earlier checkpoint") -> None:
        super().__init__(message)


@contextlib.contextmanager
def naming(model: object) -> Iterator[None]:
    """Say of which model a `NotFinite` is, as its message's first words."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{model}: {error}") from error


class Interrupted(ElaraError):
    """The user or the system asked to stop. `saved`: a checkpoint of this very step was written."""

    def __init__(self, message: str, *, saved: bool = False) -> None:
        super().__init__(message)
        self.saved = saved

    @property
    def exit_code(self) -> int:
        return EXIT_SAVED if self.saved else EXIT_INTERRUPTED


@contextlib.contextmanager
def never_fatal(what: str) -> Iterator[None]:
    """For what only shows a run to people: a failure inside costs a note that names `what`, and the run goes on."""
    try:
        yield
    except (Interrupted, NotFinite):
        raise
    except Exception as error:
        reason = str(error)
        if not isinstance(error, ElaraError):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {reason}"
        print(f"note: {what} failed, the run goes on without: {' '.join(reason.split())}", flush=True)
