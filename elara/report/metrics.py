"""metrics.csv as columns, and the arithmetic that its curves share."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elara.errors import ElaraError

Values = NDArray[np.float64]
Columns = dict[str, Values]


def read_metrics(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Columns:
    """metrics.csv by column, nan where a row has no value; a last row that is still being written is left out.

    wanted: the columns to keep beside `step`. Raises ElaraError when there is no row or the file is none of ours.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ElaraError(f"no metrics at {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    reader = csv.reader(text[: text.rfind("\n") + 1].splitlines())
    names = next(reader, [])
    rows = [row for row in reader if len(row) == len(names)]
    if not rows:
        raise ElaraError(f"no metrics in {path} yet")
    kept = [i for i, name in enumerate(names) if name == "step" or wanted(name)]
    try:
        return {names[i]: np.array([float(row[i] or "nan") for row in rows]) for i in kept}
    except ValueError as error:
        raise ElaraError(f"{path} is not a table of numbers: {error}") from error


def points(columns: Columns, name: str) -> tuple[Values, Values]:
    """Steps and values of the rows that have one; both empty for a column that is not there."""
    if name not in columns:
        return np.empty(0), np.empty(0)
    there = np.isfinite(columns[name])
    return columns["step"][there], columns[name][there]


def smooth(values: Values) -> Values:
    """Exponential mean over about a fortieth of the points, without the start's bias."""
    keep = 1 - 1 / max(1.0, len(values) / 40)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return np.array(out)
