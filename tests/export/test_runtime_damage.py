"""elara/elara.py and files that are truncated, altered or made to harm: one clear error, never anything else."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elara.elara import Elara, GGUFError
from elara.export.files import write_model
from elara.export.layout import COMPACT
from elara.tokenizer.char import CharTokenizer
from tests.export.conftest import MAKE, config

EXTREMES = [0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture
def good(make: MAKE, tmp_path: Path) -> Path:
    """A whole file of a few kilobytes, with every kind of tensor in it."""
    built = config(n_embd=32, model__n_head=2, model__n_kv_head=1, moe__num_experts=2, moe__top_k=1)
    write_model(tmp_path / "good.gguf", make(built, CharTokenizer("abc é\n")), COMPACT, "F32", None)
    return tmp_path / "good.gguf"


def attempt(path: Path) -> bool:
    """Load a file and use it; whether it was refused with one sentence. Anything else is raised."""
    said = ""
    try:
        model = Elara.load(path, threads=1, use_torch=False)
        with np.errstate(all="ignore"):
            list(model.ids([0, 1], 3, temperature=0, tidar=bool(model.length)))
    except GGUFError as error:
        said = str(error)
    assert "\n" not in said and len(said) < 400
    return bool(said)


def header_size(path: Path) -> int:
    return int(GGUFReader(path).data_offset)


def changed(good: Path, data: bytes) -> Path:
    path = good.with_name("changed.gguf")
    path.write_bytes(data)
    return path


def mutations(size: int, whole: int) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    """What to do to a file: write a number of 4 or 8 bytes, flip bits, cut the file, move a part of it."""
    place = st.integers(4, size - 1)
    one = st.one_of(
        st.tuples(st.just("u64"), place, st.sampled_from(EXTREMES)),
        st.tuples(st.just("u32"), place, st.sampled_from([n for n in EXTREMES if n < 2**32])),
        st.tuples(st.just("flip"), place, st.integers(1, 255)),
        st.tuples(st.just("cut"), st.integers(0, whole), st.just(0)),
        st.tuples(st.just("move"), place, place),
    )
    return st.lists(one, min_size=1, max_size=3)


def mutated(data: bytes, steps: list[tuple[str, int, int]]) -> bytes:
    out = bytearray(data)
    for what, at, number in steps:
        if what in ("u64", "u32"):
            packed = struct.pack("<Q" if what == "u64" else "<I", number)
            out[at : at + len(packed)] = packed
        elif what == "flip" and at < len(out):
            out[at] ^= number
        elif what == "cut":
            del out[at:]
        elif what == "move":
            out[at : at + 40] = out[number : number + 40]
    return bytes(out)


def fuzz(good: Path, examples: int) -> int:
    data, refused = good.read_bytes(), 0

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutations(header_size(good), len(data)))
    def each(steps: list[tuple[str, int, int]]) -> None:
        nonlocal refused
        refused += attempt(changed(good, mutated(data, steps)))

    each()
    return refused


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
    code = (
        "import resource, sys; from pathlib import Path; from tests.export.test_runtime_damage import fuzz, limit;"
        "limit(); print(fuzz(Path(sys.argv[1]), 5000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(good)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1000


def limit() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), taken + (1 << 30)))
