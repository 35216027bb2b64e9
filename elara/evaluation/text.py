"""Held-out text as passages: the same characters for every model, whatever its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from elara.data import DataConfig
from elara.data.sources import open_source
from elara.data.sources.base import INSIDE
from elara.errors import ElaraError
from elara.tokenizer import TextError, Tokenizer

SPREAD = 16  # times the wanted text is read at most, to choose passages evenly from


class Origin(NamedTuple):
    """Where a passage is from: document and character, and the character before it ("" at a document's start)."""

    document: int
    start: int
    before: str


@dataclass
class HeldOutText:
    """Passages of a corpus's held-out part. title: the corpus in words. documents: how many they come from.

    origins: of each passage; [] = every one is a text of its own. place: as `Source.place`, of a document.
    """

    title: str
    passages: list[str]
    documents: int
    origins: list[Origin] = field(default_factory=list)
    place: Callable[[int], tuple[str, int]] | None = None

    def encode(self, passage: int, tokenizer: Tokenizer, start: int = 0, stop: int | None = None) -> list[int]:
        """Ids of a passage's characters start..stop.

        Raises TextError for what the tokenizer does not keep: a loss on it would be of another text.
        """
        origin = self.origins[passage] if self.origins else Origin(passage, 0, "")
        whole = self.passages[passage]
        try:
            before = whole[:start][-1:] or origin.before
            ids: list[int] = tokenizer.encode_exactly(whole[start:stop], before=before).tolist()
        except TextError as error:
            name, first = (f"passage {passage + 1}", 0) if self.place is None else self.place(origin.document)
            raise error.within(name, first + origin.start + start).within(f"the {self.title}") from error
        return ids

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
    source = open_source(data, root)
    passages, origins = list[str](), list[Origin]()
    documents = size = 0
    for document in source.documents("val"):
        cut = _cut(document, passage)
        passages += cut
        befores = [INSIDE if source.place("val", documents)[1] else "", *(piece[-1:] for piece in cut)]
        origins += [Origin(documents, i * passage, before) for i, before in enumerate(befores[: len(cut)])]
        documents += 1
        size += sum(len(piece.encode("utf-8")) for piece in cut)
        if limit is not None and size >= limit:
            break
    if not size:
        raise ElaraError(f"the held-out part of data={data.name} is empty: give more text or set data.val_fraction")
    chosen = _spread(len(passages), size, max_bytes)
    passages, origins = [passages[i] for i in chosen], [origins[i] for i in chosen]
    if max_bytes is not None and len(chosen) == 1:
        passages = [passages[0].encode("utf-8")[:max_bytes].decode("utf-8", "ignore") or passages[0][:1]]
    return HeldOutText(title, passages, documents, origins, lambda document: source.place("val", document))


def _cut(document: Iterable[str], length: int) -> list[str]:
    """A document in passages of `length` characters."""
    whole = "".join(document)
    return [whole[start : start + length] for start in range(0, len(whole), length)]


def _spread(passages: int, size: int, max_bytes: int | None) -> list[int]:
    """Which of so many passages, at even distances, hold about `max_bytes` of `size` together; at least one."""
    if max_bytes is None or size <= max_bytes:
        return list(range(passages))
    count = max(1, round(passages * max_bytes / size))
    return [i * passages // count for i in range(count)]
