"""Folders of shards are read as data: as PyTorch reads them, but for what would run."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from elara import shards
from elara.errors import ElaraError
from tests.payloads import Payload, pickled

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make_state() -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(5, 3), "b": torch.arange(7), "half": torch.randn(4).bfloat16()}
    tensors["one"] = torch.ones(())
    group = {"lr": 0.01, "betas": (0.9, 0.95), "fused": True, "dtype": None, "params": ["a.weight", "b"]}
    return {"state": tensors, "param_groups": [group]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards.write(tmp_path / "shards", make_state())
    return tmp_path / "shards"


def test_the_index_is_the_one_that_pytorch_reads(folder: Path) -> None:
    ours, theirs = shards.read_index(folder), FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_tensors_and_values_come_back_as_pytorch_reads_them(folder: Path) -> None:
    empty = {name: torch.empty_like(value) for name, value in make_state()["state"].items()}
    ours: dict[str, Any] = {"state": dict(empty), "param_groups": [dict.fromkeys(make_state()["param_groups"][0])]}
    theirs: dict[str, Any] = {"state": dict(empty), "param_groups": [dict.fromkeys(make_state()["param_groups"][0])]}
    shards.read_into(folder, ours)
    load(theirs, checkpoint_id=folder)
    assert ours["param_groups"] == theirs["param_groups"] == make_state()["param_groups"]
    for name, value in make_state()["state"].items():
        assert torch.equal(ours["state"][name], value) and torch.equal(theirs["state"][name], value)
    assert torch.equal(shards.read(folder)["state.a.weight"], make_state()["state"]["a.weight"])


def global_call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument), in opcodes, for what cannot be pickled by its own name."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def patched(marker: Path) -> bytes:
    """A pickle that writes an attribute into a class that an index does consist of, then makes one of it."""
    metadata = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    return b"(" + metadata + b"(N}V__setstate__\ncos\nsystem\nstb" + f"V touch '{marker}'\n".encode() + b"t."


PICKLES = {
    "os.system": pickled,
    "eval": lambda marker: global_call("builtins", "eval", f"open({str(marker)!r}, 'w')"),
    "torch.load": lambda marker: global_call("torch", "load", str(marker)),
    "torch.os.system": lambda marker: global_call("torch", "os.system", f"touch '{marker}'"),
    "getattr of a module it may name": lambda marker: global_call("torch.serialization", "os", str(marker)),
    "a class written into": patched,
    "an extension": lambda marker: b"\x80\x02\x82\x01.",
    "a number": lambda marker: pickle.dumps(1),
    "longer than memory": lambda marker: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "nothing": lambda marker: b"",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_an_index_that_would_run_something_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    (folder / ".metadata").write_bytes(PICKLES[kind](tmp_path / "marker"))
    for reader in (shards.read, shards.shapes, lambda place: shards.read_into(place, make_state())):
        with pytest.raises(ElaraError, match=r"is damaged|do not trust") as caught:
            reader(folder)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_a_payload_within_a_real_index_is_refused(folder: Path, tmp_path: Path) -> None:
    index: Metadata = FileSystemReader(folder).read_metadata()
    harmful = replace(index, planner_data={"a": Payload(tmp_path / "marker")})
    (folder / ".metadata").write_bytes(pickle.dumps(harmful))
    with pytest.raises(ElaraError, match=r"names posix\.system, which is no part of an index: do not trust"):
        shards.read(folder)
    assert not (tmp_path / "marker").exists()


def test_a_value_that_is_a_payload_is_refused(tmp_path: Path) -> None:
    shards.write(tmp_path / "shards", {"lr": Payload(tmp_path / "marker")})
    (tmp_path / "marker").unlink(missing_ok=True)
    with pytest.raises(ElaraError, match="holds more than tensors and plain values: do not trust"):
        shards.read_into(tmp_path / "shards", {"lr": 0.0})
    assert not (tmp_path / "marker").exists()


def test_an_index_names_files_of_its_own_folder_only(folder: Path) -> None:
    index: Metadata = FileSystemReader(folder).read_metadata()
    (folder.parent / "other.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    elsewhere = {key: replace(where, relative_path="../other.distcp") for key, where in index.storage_data.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(replace(index, storage_data=elsewhere)))
    with pytest.raises(ElaraError, match=r"there is no \.\./other\.distcp"):
        shards.read(folder)
