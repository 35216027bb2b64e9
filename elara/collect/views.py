"""What is derived from a store, each file whole or as it was: kept and rejected answers, disagreement, Parquet."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import IO, Any

from elara.collect.disagreement import disagreements
from elara.collect.filters import Filters, answer
from elara.collect.store import Store
from elara.data.progress import Progress
from elara.data.samples import KEPT, write_parquet

REJECTED, DISAGREEMENT, PARQUET = "rejected.jsonl", "disagreement.jsonl", "answers.parquet"
BATCH = 256  # answers judged together


@dataclass
class Kept:
    """What the filters left. kept: by teacher; rejected: by reason for each teacher."""

    kept: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, Counter[str]] = field(default_factory=dict)


def write_kept(store: Store, filters: Filters, weights: Mapping[str, float]) -> Kept:
    """Write kept.jsonl, samples as in the store, and rejected.jsonl with a reason for each of the others.

    weights: of teachers by name, in place of those that they had when they answered.
    """
    found = Kept()
    with (
        whole(store.folder / KEPT) as kept,
        whole(store.folder / REJECTED) as rejected,
        Progress("filtering", "answers", total=len(store)) as progress,
    ):
        samples = (sample for _, sample in store.samples())
        while batch := list(islice(samples, BATCH)):
            for sample, reason in zip(batch, filters.reasons(batch), strict=True):
                name = sample.provenance["teacher"]
                if reason is None:
                    found.kept[name] += 1
                    _write(kept, replace(sample, weight=weights.get(name, sample.weight)).row())
                else:
                    found.rejected.setdefault(name, Counter())[reason] += 1
                    about = {"prompt": sample.provenance["prompt"], "teacher": name, "answer": answer(sample)}
                    _write(rejected, {"id": sample.id, "reason": reason, **about})
            progress.advance(len(batch))
    return found


def write_disagreement(store: Store) -> dict[tuple[str, str], tuple[float, int]]:
    """Write disagreement.jsonl; returns mean and number of prompts for each pair of teachers."""
    found: dict[tuple[str, str], list[float]] = {}
    with whole(store.folder / DISAGREEMENT) as file, Progress("comparing", "prompts") as progress:
        for row in disagreements(store):
            _write(file, row)
            progress.advance(1)
            for pair in row["pairs"]:
                a, b = pair["teachers"]
                found.setdefault((a, b), []).append(pair["disagreement"])
    return {pair: (fmean(values), len(values)) for pair, values in found.items()}


def write_copy(store: Store) -> Path:
    """Write all answers as Parquet; ElaraError without pyarrow."""
    file = store.folder / PARQUET
    with _beside(file) as draft:
        write_parquet(draft, (sample for _, sample in store.samples()))
    return file


@contextlib.contextmanager
def whole(file: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name when it is whole and on the disk."""
    with _beside(file) as draft, draft.open("wb") as stream:
        yield stream


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[Path]:
    draft = file.with_name(f".{file.name}.draft")  # the store is ours alone, so is the name
    try:
        yield draft
        with draft.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(draft, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        draft.unlink(missing_ok=True)


def _write(file: IO[bytes], row: Mapping[str, Any]) -> None:
    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
