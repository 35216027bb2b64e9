"""Tensors that several processes hold in shards, in one folder: PyTorch's distributed checkpoint format.

Every rank writes what it holds; any number of ranks, or one process without a group, reads it back. PyTorch pickles the
folder's index and whatever is no tensor, and its own reader runs what such a pickle says: here both are read as data.
"""

from __future__ import annotations

import errno
import io
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from elara.errors import ElaraError

INDEX = ".metadata"  # PyTorch's name for it
_OF_METADATA = ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex",
                "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")  # fmt: skip
PARTS = frozenset(
    [
        *(("torch.distributed.checkpoint.metadata", name) for name in _OF_METADATA),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        *((module, f"{system}Path") for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
    ]
)  # all that PyTorch's index consists of, beside dtypes and sizes


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state dict whose tensors may be sharded (DTensor); every rank of the process group calls this.

    Raises OSError on every rank when one of them cannot write.
    """
    try:
        save(dict(state), checkpoint_id=folder)
    except CheckpointException as error:
        reason: Any = next(iter(error.failures.values()))[0]
        raise OSError(getattr(reason, "errno", None) or errno.EIO, str(reason), str(folder)) from error


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The whole tensors' shapes by name; raises ElaraError when the folder's index is damaged."""
    found = read_index(folder).state_dict_metadata
    return {name: tuple(about.size) for name, about in found.items() if isinstance(about, TensorStorageMetadata)}


def read(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The whole tensors whose names are `wanted`, in this process alone; raises ElaraError when a file is damaged."""
    index = read_index(folder)
    try:
        state = {
            name: torch.empty(about.size, dtype=about.properties.dtype)
            for name, about in index.state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata) and wanted(name)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be here
            load(state, storage_reader=_Reader(folder, index), planner=_Planner(), no_dist=True)
    except (OSError, CheckpointException, RuntimeError) as error:
        raise _unreadable(folder, error) from error
    return state


def read_into(folder: Path, state: dict[str, Any]) -> None:
    """Fill a state dict in place, each rank with its own shards; every rank of the process group calls this.

    Raises ElaraError when a file is damaged.
    """
    try:
        load(state, storage_reader=_Reader(folder, read_index(folder)), planner=_Planner())
    except CheckpointException as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: BaseException) -> ElaraError:
    reason: Any = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    if isinstance(reason, pickle.UnpicklingError):  # whose words advise to run it
        return ElaraError(f"{folder} holds more than tensors and plain values: do not trust this checkpoint")
    return ElaraError(f"{folder} is damaged: {(str(reason).splitlines() or [type(reason).__name__])[0]}")


def read_index(folder: Path) -> Metadata:
    """What a folder of shards holds, and where; raises ElaraError when its index is damaged or none."""
    file = folder / INDEX
    try:
        with open(file, "rb") as stream:
            found = _IndexUnpickler(stream).load()
        return _metadata(found.state, {path.name for path in folder.glob("*.distcp")})
    except _Foreign as error:
        raise ElaraError(f"{file} names {error}, which is no part of an index: do not trust this checkpoint") from error
    except Exception as error:  # a damaged pickle may end in any
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ElaraError(f"{folder} is damaged: {INDEX} cannot be read ({reason})") from error


class _Foreign(Exception):
    """A pickle asks for something that an index does not consist of."""


class _Part:
    """Stands for an object in a pickled index: nothing of its class runs; `state` is what was to fill it."""

    state: Any

    def __init__(self, *arguments: Any) -> None:
        self.state = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Makes numbers, texts, dtypes, lists and dicts as they are, and a `_Part` of everything else that it knows."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) not in PARTS:
            raise _Foreign(f"{module}.{name}")
        return type(name, (_Part,), {})  # a new one each time: a pickle can write attributes into a class


def _metadata(found: Mapping[str, Any], files: set[str]) -> Metadata:
    """PyTorch's index from its parts; raises some exception where they do not make one. files: that may be read."""
    storage = {}
    for key, value in found["storage_data"].items():
        place, where = key.state, value.state
        if where["relative_path"] not in files:
            raise ValueError(f"there is no {where['relative_path']}")
        index = MetadataIndex(_name(place["fqn"]), _size(place.get("offset")))
        storage[index] = _StorageInfo(where["relative_path"], *_size((where["offset"], where["length"])))
    return Metadata(
        {_name(name): _about(part) for name, part in found["state_dict_metadata"].items()}, storage_data=storage
    )


def _about(part: _Part) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(part).__name__ == BytesStorageMetadata.__name__:
        return BytesStorageMetadata()
    dtype = part.state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype} is no dtype")
    chunks = [
        ChunkStorageMetadata(*(torch.Size(_size(chunk.state[key])) for key in ("offsets", "sizes")))
        for chunk in part.state["chunks"]
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(_size(part.state["size"])), chunks)


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value} is no name")
    return value


def _size(value: Any) -> Any:
    """Numbers of elements or bytes."""
    if value is not None and not (isinstance(value, tuple) and all(isinstance(n, int) and n >= 0 for n in value)):
        raise ValueError(f"{value} are no sizes")
    return value


class _Reader(FileSystemReader):
    """PyTorch's, with an index that was read already."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _Planner(DefaultLoadPlanner):
    """PyTorch's, which would unpickle whatever stands for a value that is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
