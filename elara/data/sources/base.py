"""What a source of text offers to the preparation, and the way from documents to token files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from elara.data.progress import Progress
from elara.data.tokens import TokenWriter
from elara.tokenizer import Ids, TextError, Tokenizer

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
INSIDE = "\n"  # stands for the character before a part of a text
Counts = dict[str, dict[str, int]]  # split -> documents, tokens, characters


class Source(Protocol):
    """A corpus with its own split into training and validation text."""

    def identity(self) -> dict[str, Any]:
        """All that fixes the text (JSON values, with hashes); prepared data is rebuilt when it changes."""
        ...

    def text(self) -> Iterator[str]:
        """All text of both splits, in pieces; what a `char` tokenizer takes its characters from."""
        ...

    def documents(self, split: Split) -> Iterator[Iterable[str]]:
        """The split's documents in a fixed order, each in pieces; read only as far as they are asked for."""
        ...

    def place(self, split: Split, document: int) -> tuple[str, int]:
        """What messages call a document (its number in `documents`), and the character of it at which that begins."""
        ...

    def write(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], work: Path) -> Counts:
        """Write `train` and `val` token files into `folder`; `work` may keep finished parts between attempts."""
        ...


class DocumentSource(ABC):
    """Sources that are read in one process; their long texts are encoded by threads."""

    ends_documents = True  # every document is followed by the tokenizer's end id

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """See `Source.identity`."""

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Iterable[str]]:
        """The split's documents in a fixed order, each in pieces of a few megabytes."""

    def text(self) -> Iterator[str]:
        for split in SPLITS:
            for document in self.documents(split):
                yield from document

    def place(self, split: Split, document: int) -> tuple[str, int]:
        return f"document {document + 1} of the {split} part", 0

    def write(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], work: Path) -> Counts:
        counts: Counts = {}
        with Progress("tokenising", unit="characters") as progress:
            for split in SPLITS:
                with TokenWriter(folder, split, dtype) as writer:
                    for piece, ids in self._encoded(split, tokenizer):
                        if ids is not None:
                            writer.write(ids, len(piece))
                            progress.advance(len(piece))
                            continue
                        if self.ends_documents:
                            writer.write([tokenizer.end_id], 0)
                        writer.end_document()
                    counts[split] = writer.counts
        return counts

    def _encoded(self, split: Split, tokenizer: Tokenizer) -> Iterator[tuple[str, Ids | None]]:
        """Pieces with their ids, in order; ("", None) marks a document's end."""
        document = start = 0
        for piece, future in self._in_threads(split, tokenizer):
            try:
                yield piece, None if future is None else future.result()
            except TextError as error:
                name, first = self.place(split, document)
                raise error.within(name, first + start) from error
            document, start = (document + 1, 0) if future is None else (document, start + len(piece))

    def _in_threads(self, split: Split, tokenizer: Tokenizer) -> Iterator[tuple[str, Future[Ids] | None]]:
        """Pieces with what will be their ids, in order; None marks a document's end. Encoders release the interpreter
        lock."""
        threads = os.cpu_count() or 1
        waiting: deque[tuple[str, Future[Ids] | None]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for number, document in enumerate(self.documents(split)):
                before = INSIDE if self.place(split, number)[1] else ""
                for piece in document:
                    waiting.append((piece, pool.submit(tokenizer.encode_exactly, piece, before=before)))
                    before = piece[-1:] or before
                    while len(waiting) > 2 * threads:
                        yield waiting.popleft()
                waiting.append(("", None))
            yield from waiting


