"""Files altered at random, read by elara/elara.py: `python tests/export/fuzz.py good.gguf 5000`, within a gigabyte."""

from __future__ import annotations

import resource
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elara.elara import Elara, GGUFError

EXTREMES = [0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


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


def limit() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), taken + (1 << 30)))


if __name__ == "__main__":
    limit()
    print(fuzz(Path(sys.argv[1]), int(sys.argv[2])))
