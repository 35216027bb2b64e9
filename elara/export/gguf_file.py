"""Writing a GGUF file tensor by tensor: no more than one of them is in memory, and a file with its name is whole."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from elara.data.progress import Progress
from elara.errors import ElaraError
from elara.export.layout import Piece

Read = Callable[[Piece, GGMLQuantizationType], NDArray[np.uint8]]  # the bytes of a piece in a type, (..., row bytes)


def write_gguf(
    path: Path,
    architecture: str,
    pieces: Sequence[Piece],
    types: Mapping[str, GGMLQuantizationType],
    read: Read,
    describe: Callable[[GGUFWriter], None],
) -> None:
    """Write the file under a temporary name and rename it; an older file of that name is replaced.

    types: of every tensor, by its name in the file. read: called once for each piece and each of its types. describe:
    adds the keys. Raises ElaraError when the disk is full or the folder cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    writer = GGUFWriter(temporary, architecture)
    describe(writer)
    sizes = {}
    for piece in pieces:
        for name in piece.names:
            row = row_bytes(types[name], piece.shape[-1])
            sizes[name] = prod(piece.shape[:-1]) * row
            shape = (*piece.shape[:-1], row)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), sizes[name], raw_dtype=types[name])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with Progress(f"writing {path.name}", "kB", total=sum(sizes.values()) // 1000) as progress:
            for piece in pieces:
                _write(writer, piece, types, read, lambda name: progress.advance(sizes[name] // 1000))
        writer.flush()
        _sync(writer)
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "the disk is full or broken"
        raise ElaraError(f"cannot write {path}: {reason}; make room or give output=PATH") from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of `width` values in a row."""
    values, size = GGML_QUANT_SIZES[kind]
    return width // values * size


def _write(
    writer: GGUFWriter,
    piece: Piece,
    types: Mapping[str, GGMLQuantizationType],
    read: Read,
    written: Callable[[str], None],
) -> None:
    """The passes of a block hold the same values: each type of them is made once."""
    made: dict[GGMLQuantizationType, NDArray[np.uint8]] = {}
    left = [types[name] for name in piece.names]
    for name in piece.names:
        kind = types[name]
        if kind not in made:
            made[kind] = read(piece, kind)
        writer.write_tensor_data(made[kind])
        left.remove(kind)
        if kind not in left:
            del made[kind]
        written(name)


def _sync(writer: GGUFWriter) -> None:
    files: Iterable[object] = writer.fout or ()
    for file in files:
        os.fsync(file.fileno())  # type: ignore[attr-defined]
