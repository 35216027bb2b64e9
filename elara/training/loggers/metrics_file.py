"""metrics.csv: the figures of a run, from which its pictures are drawn."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from elara.errors import ElaraError


class CSV(Logger):
    """One metrics.csv with one row per step, complete on disk after every call.

    A step that is logged again, after a resume, replaces the rows from there on, so that the file reads like that of
    an uninterrupted run; figures that come in several calls for one step share its row.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []
        self._row: dict[str, str] = {}
        self._offset = 0  # where the last row begins
        self._ready = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml in the same folder has them

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Merge `metrics` into the row of `step`."""
        assert step is not None
        if not self._ready:
            self._open(step)
        if self._row.get("step") != str(step):
            if self._row:
                self._offset = self.path.stat().st_size
            self._row = {"step": str(step)}
        self._row.update({name: format(float(value), ".9g") for name, value in metrics.items()})
        new = [name for name in self._row if name not in self._columns]
        if new:
            self._columns += new
            self._rewrite(self._read()[0] if self.path.exists() else [])
        with open(self.path, "r+", encoding="utf-8", newline="") as file:
            file.seek(self._offset)
            csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerow(self._row)
            file.truncate()

    def _open(self, step: int) -> None:
        """Take over a file from before: rows ahead of `step` stay, its own row is continued, later ones go."""
        self._ready = True
        if not self.path.exists():
            return
        rows, self._columns = self._read()
        earlier = [row for row in rows if int(row["step"]) < step]
        self._row = next((row for row in rows if int(row["step"]) == step), {})
        self._row = {name: value for name, value in self._row.items() if value != ""}
        self._rewrite(earlier)

    def _read(self) -> tuple[list[dict[str, str]], list[str]]:
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                # a killed process can leave half a last row
                rows = [row for row in reader if row["step"].isdigit() and None not in row and None not in row.values()]
                return rows, list(reader.fieldnames or [])
        except (ValueError, KeyError, csv.Error) as error:
            raise ElaraError(f"{self.path} is no table of a run's figures: delete it, and the run goes on") from error

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Write header and `rows` anew; the current row comes behind them."""
        rows = [row for row in rows if row["step"] != self._row.get("step")]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            self._offset = file.tell()
        os.replace(temporary, self.path)
