"""Held-out text as passages: the same characters for every model, whatever its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from elara.data import DataConfig
from elara.data.sources import open_source
from elara.errors import ElaraError

SPREAD = 16  # times the wanted text is read at most, to choose passages evenly from


@dataclass
class HeldOutText:
    """Passages of a corpus's held-out part. title: the corpus in words. documents: how many they come from."""

    title: str
    passages: list[str]
    documents: int

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all passages."""
        return sum(len(passage.encode("utf-8")) for passage in self.passages)


def held_out_text(data: DataConfig, root: Path, *, max_bytes: int | None = None, passage: int = 4096) -> HeldOutText:
    """Read the held-out documents of `data`, cut them and keep passages spread evenly over them.

    root: folder of downloads and prepared data. max_bytes: UTF-8 bytes to keep; None = all. passage: characters of
    each passage; the last of a document is shorter. Raises ElaraError as the source does, or when there is no text.
    """
    title = f"held-out part of {data.name}" + (f" {data.path}" if data.path else "")
    limit = None if max_bytes is None else SPREAD * max_bytes
    passages: list[str] = []
    documents = size = 0
    for document in open_source(data, root).documents("val"):
        cut = _cut(document, passage)
        passages += cut
        documents += 1
        size += sum(len(piece.encode("utf-8")) for piece in cut)
        if limit is not None and size >= limit:
            break
    if not size:
        raise ElaraError(f"the held-out part of data={data.name} is empty: give more text or set data.val_fraction")
    return HeldOutText(title, _spread(passages, size, max_bytes), documents)


def _cut(document: Iterable[str], length: int) -> list[str]:
    """A document in passages of `length` characters."""
    whole = "".join(document)
    return [whole[start : start + length] for start in range(0, len(whole), length)]


def _spread(passages: list[str], size: int, max_bytes: int | None) -> list[str]:
    """Passages at even distances that hold about `max_bytes` together; at least one, cut when it is larger."""
    if max_bytes is None or size <= max_bytes:
        return passages
    count = max(1, round(len(passages) * max_bytes / size))
    chosen = [passages[i * len(passages) // count] for i in range(count)]
    if count == 1:
        chosen = [chosen[0].encode("utf-8")[:max_bytes].decode("utf-8", "ignore") or chosen[0][:1]]
    return chosen
