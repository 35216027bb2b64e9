"""The values of one metric as a running trial writes them to its metrics.csv."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Curve:
    """Reads `metric` by step from a metrics.csv that is still being written; a look costs what was added since.

    The file grows at its end, its last row may still change, and it is replaced as a whole when a column joins. Its
    header tells that; its inode does not, as the new file may get that of one that was replaced before.
    """

    path: Path
    metric: str
    columns: list[str] = field(default_factory=list)
    values: dict[int, float] = field(default_factory=dict)  # by optimizer step
    _seen: tuple[int, int, int] = (0, 0, 0)  # inode, size and time of change at the last look
    _header: bytes = b""
    _row: int = 0  # where the last whole row begins

    def read(self) -> list[tuple[int, float]]:
        """The (step, value) pairs that are new since the last call, in order."""
        try:
            state = self.path.stat()
            seen = (state.st_ino, state.st_size, state.st_mtime_ns)
            if seen == self._seen:
                return []
            with open(self.path, "rb") as file:
                header = file.readline()
                if header != self._header or state.st_size < self._row:
                    self._header, self._row = header, len(header)
                    self.columns = next(csv.reader([header.decode()]), [])
                file.seek(self._row)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        self._seen = seen
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # half a row
        new = [pair for line in lines if (pair := self._pair(line)) is not None and pair[0] not in self.values]
        self.values.update(new)
        self._row += sum(map(len, lines[:-1]))
        return new

    def _pair(self, line: bytes) -> tuple[int, float] | None:
        cells = next(csv.reader([line.decode()]), [])
        if len(cells) != len(self.columns):
            return None
        row = dict(zip(self.columns, cells, strict=True))
        step, value = row.get("step", ""), row.get(self.metric, "")
        return (int(step), float(value)) if step.isdigit() and value else None
