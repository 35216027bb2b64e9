"""Standard output and error whose reader may go away: `| head`, a closed terminal, a viewer of logs that ends."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class OutputClosedError(BrokenPipeError):
    """Nobody reads what a command prints that does nothing else."""


class _Shielded(io.FileIO):
    """Writes into nothing once the reader is gone, also for child processes."""

    def __init__(self, descriptor: int, ends: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._ends = ends

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._ends:
                raise OutputClosedError(*error.args) from error
            return len(data)


def shield(*, ends: bool = False) -> None:
    """Let this process go on in silence when nobody reads its output any more.

    ends: raise OutputClosedError instead, once, for a command that does nothing but print.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this process; the next file opened would get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open for good
        elif stream is getattr(sys, f"__{name}__"):  # else somebody catches it
            stream.flush()
            raw = _Shielded(stream.fileno(), ends and name == "stdout")
            buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
            shielded = io.TextIOWrapper(
                buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, shielded)
