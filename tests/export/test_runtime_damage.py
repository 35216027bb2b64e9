"""elara/elara.py and files that are truncated, altered or made to harm: one clear error, never anything else."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elara.elara import Elara, GGUFError
from elara.export.files import write_model
from elara.export.layout import COMPACT
from elara.tokenizer.char import CharTokenizer
from tests.conftest import ROOT
from tests.export.conftest import MAKE, config
from tests.export.fuzz import attempt, changed, fuzz, header_size


@pytest.fixture
def good(make: MAKE, tmp_path: Path) -> Path:
    """A whole file of a few kilobytes, with every kind of tensor in it."""
    built = config(n_embd=32, model__n_head=2, model__n_kv_head=1, moe__num_experts=2, moe__top_k=1)
    write_model(tmp_path / "good.gguf", make(built, CharTokenizer("abc é\n")), COMPACT, "F32", None)
    return tmp_path / "good.gguf"


def test_a_whole_file_is_read(good: Path) -> None:
    assert not attempt(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"GGML" + data[4:], "no GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "no GGUF file of version 2 or 3"),
        (lambda data: data[:200], "truncated or damaged"),
        (lambda data: data[:-1000], "truncated or damaged"),
        (lambda data: data.replace(b"output_norm.weight", b"output_norn.weight"), "lacks the tensor output_norm"),
        (lambda data: data.replace(b"general.architecture", b"general.brchitecture"), "architecture is missing"),
        (lambda data: data[:8] + struct.pack("<Q", 2**62) + data[16:], "truncated or damaged|is missing"),
        (lambda data: data[:16] + struct.pack("<Q", 2**62) + data[24:], "truncated or damaged"),
    ],
    ids=["empty", "magic", "version", "header cut", "data cut", "tensor", "key", "tensors", "keys"],
)  # fmt: skip
def test_each_damage_has_its_sentence(good: Path, change, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        Elara.load(changed(good, change(good.read_bytes())))


def test_a_type_that_is_not_known_is_named(good: Path) -> None:
    data = good.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    with pytest.raises(GGUFError, match=r"token_embd.weight .* type 39"):
        Elara.load(changed(good, data[:at] + struct.pack("<I", 39) + data[at + 4 :]))


def test_weights_that_are_no_numbers_are_refused(good: Path) -> None:
    data = bytearray(good.read_bytes())
    data[header_size(good) :] = np.full((len(data) - header_size(good)) // 4, np.nan, np.float32).tobytes()
    with pytest.raises(GGUFError, match="no numbers"), np.errstate(all="ignore"):
        list(Elara.load(changed(good, bytes(data)), use_torch=False).ids([0], 3))


def test_hundreds_of_altered_headers(good: Path) -> None:
    assert fuzz(good, 400) > 100


@pytest.mark.slow
def test_thousands_of_altered_headers_within_little_memory(good: Path) -> None:
    """In a process of its own, which may not take a gigabyte more than it has, nor more than two minutes."""
    command = [sys.executable, "tests/export/fuzz.py", str(good), "5000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1000
