"""Tensors that several processes hold in shards, in one folder: PyTorch's distributed checkpoint format.

Every rank writes what it holds; any number of ranks, or one process without a group, reads it back.
"""

from __future__ import annotations

import errno
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from elara.errors import ElaraError


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
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, CheckpointException, pickle.UnpicklingError, EOFError) as error:
        raise ElaraError(f"{folder} is damaged: {str(error).splitlines()[0]}") from error
    return {name: tuple(about.size) for name, about in found.items() if isinstance(about, TensorStorageMetadata)}


def read(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The whole tensors whose names are `wanted`, in this process alone; raises ElaraError when a file is damaged."""
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
        state = {
            name: torch.empty(about.size, dtype=about.properties.dtype)
            for name, about in found.items()
            if isinstance(about, TensorStorageMetadata) and wanted(name)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be here
            load(state, checkpoint_id=folder, no_dist=True)
    except (OSError, CheckpointException, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ElaraError(f"{folder} is damaged: {str(error).splitlines()[0]}") from error
    return state


def read_into(folder: Path, state: dict[str, Any]) -> None:
    """Fill a state dict in place, each rank with its own shards; every rank of the process group calls this.

    Raises ElaraError when a file is damaged.
    """
    try:
        load(state, checkpoint_id=folder)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ElaraError(f"{folder} is damaged: {str(reason).splitlines()[0]}") from error
