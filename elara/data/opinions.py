"""What a teacher says behind every token of a split, on disk beside the tokens: read with a batch's own windows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elara.data.tokens import token_dtype
from elara.errors import ElaraError
from elara.runs import write_whole

LOWEST = -1000.0  # log-probabilities below are kept as this
PART = 1 << 14  # tokens that are looked through at once
MANIFEST = "manifest.json"  # written last: a folder that has it is whole


class StoredOpinion(NamedTuple):
    """Of the windows of one batch.

    ids: int64 (batch, seq, k), the likeliest tokens behind each, -1 where there are fewer; logprobs: float32 (batch,
    seq, k + 1), the rest of the vocabulary last, adding up to 1. following: float32 (batch, seq), of the token that
    does follow; nan where there is no opinion.
    """

    ids: Tensor
    logprobs: Tensor
    following: Tensor


class OpinionFile:
    """One teacher's opinions on one split, memory-mapped. 2 (4 for large vocabularies) + 2 bytes per token and k."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            n, k, ids = self.about["tokens"], self.about["k"], self.about["ids"]
            if ids not in ("<u2", "<u4"):  # of objects, bytes would be taken for places in memory
                raise ValueError("its ids are of no type that ids have")
            self._ids = _map(folder / "ids", np.dtype(ids), (n, k))
            self._logprobs = _map(folder / "logprobs", np.dtype("<f2"), (n, k + 1))
            self._following = _map(folder / "following", np.dtype("<f2"), (n,))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ElaraError(f"what a teacher said in {folder} cannot be read ({error}): delete it") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return OpinionFile, (self.folder,)

    @property
    def checked(self) -> bool:
        """Whether all of it was looked through for nan once."""
        return bool(self.about.get("checked"))

    def mark_checked(self) -> None:
        """Remember that."""
        self.about["checked"] = True
        write_whole(self.folder / MANIFEST, json.dumps(self.about, indent=2) + "\n")

    def parts(self) -> Iterator[StoredOpinion]:
        """All of it, a row of `PART` tokens at a time."""
        for start in range(0, len(self._following), PART):
            yield self.read(np.arange(start, min(start + PART, len(self._following)))[None])

    def read(self, places: NDArray[np.int64]) -> StoredOpinion:
        """Behind the tokens at `places` (batch, seq); those below 0 and the last one of all give anything."""
        at = places.clip(0, len(self._following) - 1)
        logprobs = torch.from_numpy(self._logprobs[at].astype(np.float32)).log_softmax(-1)  # float16 rounds the sum
        ids = torch.from_numpy(self._ids[at].astype(np.int64))
        ids[ids == np.iinfo(self._ids.dtype).max] = -1
        return StoredOpinion(ids, logprobs, torch.from_numpy(self._following[at].astype(np.float32)))


class OpinionWriter:
    """Appends to a folder that may hold a part already; `finish` makes it an `OpinionFile`.

    Attributes:
        done: tokens that have their opinions on disk.
    """

    def __init__(self, folder: Path, k: int, vocab_size: int) -> None:
        self.folder, self.k, self.ids = folder, k, token_dtype(vocab_size + 1)  # the last one for "none"
        self._rows = {"ids": k * self.ids.itemsize, "logprobs": 2 * (k + 1), "following": 2}  # bytes per token
        folder.mkdir(parents=True, exist_ok=True)
        self.done = min(_size(folder / name) // width for name, width in self._rows.items())
        self._failed = False
        self._files = {name: (folder / name).open("ab") for name in self._rows}
        for name, width in self._rows.items():
            self._files[name].truncate(self.done * width)

    def check_room(self, tokens: int) -> None:
        """Raise ElaraError where the disk has no room for the opinions on so many tokens in all."""
        needed, free = (tokens - self.done) * sum(self._rows.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            lack = f"takes {needed / 1e6:,.0f} MB, and {self.folder.parent} has {free / 1e6:,.0f} MB free"
            advice = "make room, lower distill.top_k, or take distill.opinions=live"
            raise ElaraError(f"what a teacher says {lack}: {advice}")

    def write(self, ids: Tensor, logprobs: Tensor, following: Tensor) -> None:
        """ids: (n, k); logprobs: (n, k + 1); following: (n). Raises ElaraError when that cannot be written."""
        rows = {"ids": ids.cpu().numpy().astype(self.ids)}
        for name, value in (("logprobs", logprobs), ("following", following)):
            rows[name] = value.cpu().numpy().clip(min=LOWEST).astype("<f2")
        try:
            for name, file in self._files.items():
                file.write(rows[name].tobytes())
                file.flush()
        except OSError as error:
            self._failed = True
            reason = f"cannot write what a teacher said to {self.folder}: {error.strerror}"
            raise ElaraError(f"{reason}; make room and run again, it goes on there") from error
        self.done += len(ids)

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the manifest, behind `stop`; about: more JSON values for it."""
        manifest = {"tokens": self.done, "k": self.k, "ids": self.ids.str, **about}
        draft = self.folder / f".{MANIFEST}"
        draft.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.folder / MANIFEST)

    def stop(self) -> None:
        """Close the files; what they hold is gone on with another time."""
        for file in self._files.values():
            with suppress(OSError) if self._failed else nullcontext():  # `write` has said it
                file.close()


def _map(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if (size := _size(file)) != (wanted := int(np.prod(shape)) * dtype.itemsize):
        raise ValueError(f"{file.name} has {size} bytes instead of {wanted}")
    return np.asarray(np.memmap(file, dtype, mode="r", shape=shape))


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
