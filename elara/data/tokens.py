"""Token files: packed uint16/uint32 ids on disk, memory-mapped, with the documents' ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elara.errors import ElaraError


class TokenFile:
    """Tokens of one split, never loaded as a whole.

    Attributes:
        tokens: memory-mapped ids (n,), uint16 or uint32.
        ends: int64 positions behind each document's last token; the last one is n.
        weights: float16 (n,), what each token counts as a target; None where all count alike.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        entry = _read_json(folder / "manifest.json")
        if entry.get("dtype") not in ("<u2", "<u4"):  # of objects, bytes would be taken for places in memory
            raise ElaraError(f"{folder / 'manifest.json'} has no dtype of tokens: delete {folder} and run again")
        counts, self.dtype = entry[split], np.dtype(entry["dtype"])
        self.tokens = self._map(folder / f"{split}.bin", self.dtype, counts["tokens"])
        self.ends = self._map(folder / f"{split}.ends", np.dtype("<i8"), counts["documents"])
        weights = folder / f"{split}.weights"
        self.weights = self._map(weights, np.dtype("<f2"), counts["tokens"]) if entry.get("weights") else None

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.folder, self.split)  # workers map the file again instead of copying it

    @staticmethod
    def _map(file: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        size = file.stat().st_size if file.exists() else -1
        if size != count * dtype.itemsize:
            wanted = count * dtype.itemsize
            raise ElaraError(f"{file} has {size} bytes instead of {wanted}: delete {file.parent} and run again")
        if not count:
            return np.empty(0, dtype)
        return np.asarray(np.memmap(file, dtype, mode="r"))


class TokenWriter:
    """Appends documents to `<split>.bin`, `<split>.ends` and, where tokens count differently, `<split>.weights`."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], *, weights: bool = False) -> None:
        self._weights = (folder / f"{split}.weights").open("wb") if weights else None
        self._tokens = (folder / f"{split}.bin").open("wb")
        self._ends = (folder / f"{split}.ends").open("wb")
        self._dtype = dtype
        self.counts = {"documents": 0, "tokens": 0, "characters": 0}

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._tokens.close()
        self._ends.close()
        if self._weights is not None:
            self._weights.close()

    def write(self, ids: NDArray[Any] | list[int], characters: int, weights: NDArray[Any] | None = None) -> None:
        """Append ids that stand for so many characters of text to the open document, with their weights."""
        if self._weights is not None:
            self._weights.write(np.asarray(weights, "<f2").tobytes())
        self._tokens.write(np.asarray(ids, self._dtype).tobytes())
        self.counts["tokens"] += len(ids)
        self.counts["characters"] += characters

    def end_document(self) -> None:
        """Close the open document at the tokens written so far."""
        self._ends.write(np.asarray([self.counts["tokens"]], "<i8").tobytes())
        self.counts["documents"] += 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smaller of uint16 and uint32 that holds every id, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def concatenate(parts: Iterable[Path], folder: Path, split: str) -> dict[str, int]:
    """Join the token files of finished parts, in order; returns the counts."""
    counts = {"documents": 0, "tokens": 0, "characters": 0}
    with (folder / f"{split}.bin").open("wb") as tokens, (folder / f"{split}.ends").open("wb") as ends:
        for part in parts:
            piece = TokenFile(part, split)
            for start in range(0, len(piece), 1 << 24):
                tokens.write(piece.tokens[start : start + (1 << 24)].tobytes())
            ends.write((piece.ends + counts["tokens"]).astype("<i8").tobytes())
            for key, value in _read_json(part / "manifest.json")[split].items():
                counts[key] += value
    return counts


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ElaraError(f"{file} cannot be read ({error}): delete {file.parent} and run again") from error
    return data
