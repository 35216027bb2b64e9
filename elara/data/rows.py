"""Rows of local files: JSON lines, JSON and Parquet, each file by itself, whatever columns the others have."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from elara.errors import ElaraError

PARQUET = ".parquet"
JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
LOOK = 1000  # rows of a JSON file in which a column must come once


def json_values(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file with one on each line, or of a file that is one JSON list, each with the name of its place.

    Raises ElaraError that names file and line for what is no JSON, or half a character (a lone surrogate).
    """
    try:
        with _opened(file) as stream:
            first = next((line for line in stream if line.strip()), "")
            if first.lstrip().startswith("[") and not file.name.endswith((".jsonl", ".jsonl.gz")):
                for number, value in enumerate(_parsed(first + stream.read(), str(file)), 1):
                    yield f"row {number} of {file}", value
                return
            stream.seek(0)
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, _parsed(line, where)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ElaraError(f"cannot read {file}: {error}") from error


def texts(file: Path, column: str, start: int = 0) -> Iterator[str]:
    """The texts of a column, from row `start` on; "" where a row has none. Raises ElaraError that names the file."""
    values = _parquet_column(file, column, start) if file.suffix == PARQUET else _json_column(file, column, start)
    for where, value in values:
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise ElaraError(f"{where}: column {column} holds {kind}, not text: set data.text_field")
        yield value or ""


def parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows of a Parquet file, each with the name of its place; ElaraError that names the file."""
    pa, parquet = pyarrow()
    try:
        table = parquet.ParquetFile(file)
        for group in range(table.num_row_groups):
            for number, row in enumerate(table.read_row_group(group).to_pylist()):
                yield f"{file}, row {number} of group {group}", row
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ElaraError(f"cannot read {file}: {error}") from error


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and its module for Parquet; ElaraError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ElaraError("Parquet files need an extra: pip install 'elara-hivemind[hub]'") from error
    return pyarrow, pyarrow.parquet


def _json_column(file: Path, column: str, start: int) -> Iterator[tuple[str, Any]]:
    names, known = dict[str, None](), False
    for number, (where, row) in enumerate(json_values(file)):
        if not isinstance(row, Mapping):
            raise ElaraError(f"{where} is no JSON object: a row with the column {column} is needed")
        known = known or column in row
        if not known:
            names |= dict.fromkeys(row)
            if number == LOOK:
                break
        if number >= start:
            yield where, row.get(column)  # some programs leave out what is null
    if names and not known:
        raise _no_column(file, column, names)


def _parquet_column(file: Path, column: str, start: int) -> Iterator[tuple[str, Any]]:
    pa, parquet = pyarrow()
    try:
        table = parquet.ParquetFile(file)
        if not table.metadata.num_rows:
            return
        if column not in table.schema_arrow.names:
            raise _no_column(file, column, table.schema_arrow.names)
        row = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if row + size <= start:
                row += size
                continue
            batches = table.iter_batches(batch_size=256, row_groups=[group], columns=[column])
            for value in itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches):
                if row >= start:
                    yield f"row {row + 1} of {file}", value
                row += 1
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ElaraError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from error


def _no_column(file: Path, column: str, names: Any) -> ElaraError:
    return ElaraError(f"data.text_field={column} is not a column of {file}; it has {', '.join(names)}")


def _opened(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _parsed(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ElaraError(f"{where} is not JSON ({error}): mend or delete it") from error
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ElaraError(f"{where} has half a character ({half}, a lone surrogate): mend or delete it") from error
    return value
