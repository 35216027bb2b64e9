"""The user's own text: one file, split by position, or a folder, split by whole files."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from elara.data.files import walk
from elara.data.hashes import file_hash
from elara.data.sources.base import SPLITS, Counts, DocumentSource, Split
from elara.errors import ElaraError
from elara.tokenizer import Tokenizer

PIECE = 1 << 22  # characters per piece of a long file
LEAST = 0.01  # of the wanted share: what is held out is no measure with less
TAIL = 1 << 16  # a piece is cut within its last so many characters
_WORD_START = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")  # a cut here changes no token of GPT-2's BPE


class SingleFile(DocumentSource):
    """One UTF-8 file: the first characters train, the last `val_fraction` of them validate.

    The cut is a position, not the end of a document, so no end token is added on either side.
    """

    ends_documents = False

    def __init__(self, file: Path, val_fraction: float, root: Path) -> None:
        self._file, self._fraction, self._root = file, val_fraction, root

    def identity(self) -> dict[str, Any]:
        return {
            "source": "text",
            "path": str(self._file),
            "sha256": file_hash(self._file, self._root),
            "val_fraction": self._fraction,
        }

    def documents(self, split: Split) -> Iterator[Iterator[str]]:
        start, stop = (0, self._cut) if split == "train" else (self._cut, None)
        yield _pieces(self._file, start, stop)


    def place(self, split: Split, document: int) -> tuple[str, int]:
        return str(self._file), 0 if split == "train" else self._cut

    @cached_property
    def _cut(self) -> int:
        """How many characters train."""
        return train_characters(sum(map(len, _characters(self._file))), self._fraction)


class Folder(DocumentSource):
    """Every text file below a folder is a document; whole files validate, chosen by the hash of their names."""

    def __init__(self, folder: Path, val_fraction: float, root: Path) -> None:
        self._folder, self._fraction, self._root = folder, val_fraction, root
        self._found = walk(folder)
        self._files = self._found.files
        if len(self._files) < 2:
            raise ElaraError(f"data.path={folder} holds {len(self._files)} files, at least two are needed: "
                             "one is held out; for a single text give the file itself")

    def identity(self) -> dict[str, Any]:
        return {
            "source": "text",
            "path": str(self._folder),
            "sha256": {self._name(file): file_hash(file, self._root) for file in self._files},
            "held_out": [self._name(file) for file in self._held_out],
        }

    def documents(self, split: Split) -> Iterator[Iterator[str]]:
        yield from map(_pieces, self._part[split])

    def place(self, split: Split, document: int) -> tuple[str, int]:
        return str(self._part[split][document]), 0

    def write(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], work: Path) -> Counts:
        self._found.note()
        return super().write(folder, tokenizer, dtype, work)

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    @cached_property
    def _part(self) -> dict[Split, list[Path]]:
        """The files of each part."""
        held_out = set(self._held_out)
        return {split: [file for file in self._files if (file in held_out) == (split == "val")] for split in SPLITS}

    @cached_property
    def _held_out(self) -> list[Path]:
        """Files in the order of their names' hashes until the share is reached, skipping those that overshoot it.

        Where that makes less than half of the share, as beside books a note does, the smallest of the larger files is
        held out instead, unless it is more than half of all.
        """
        sizes = {file: file.stat().st_size for file in self._files}
        total, reached, chosen = sum(sizes.values()), 0, list[Path]()
        share = self._fraction * total
        order = sorted(self._files, key=lambda file: hashlib.sha256(self._name(file).encode()).digest())
        for file in order:
            if reached + sizes[file] <= 1.1 * share:
                chosen.append(file)
                reached += sizes[file]
        if reached >= share / 2:
            return chosen
        larger = [file for file in order if sizes[file] > reached and 2 * sizes[file] <= total]
        chosen = [min(larger, key=sizes.__getitem__)] if larger else chosen or [min(order, key=sizes.__getitem__)]
        if sum(sizes[file] for file in chosen) < LEAST * share:
            largest = max(order, key=sizes.__getitem__)
            raise ElaraError(f"data.path={self._folder}: nearly all text is in {largest}, and whole files are held "
                             "out: give this file itself, or more files")
        return chosen


def open_text(path: str | None, val_fraction: float, root: Path) -> SingleFile | Folder:
    """The source for `data.path`; ElaraError when it is missing."""
    if path is None:
        raise ElaraError("data=text needs data.path=<a text file or a folder of them>")
    if not 0 < val_fraction < 1:
        raise ElaraError(f"data.val_fraction={val_fraction} must be between 0 and 1")
    place = Path(path).expanduser().resolve()
    if place.is_dir():
        return Folder(place, val_fraction, root)
    if not place.is_file():
        raise ElaraError(f"data.path={path} does not exist")
    return SingleFile(place, val_fraction, root)


def train_characters(characters: int, val_fraction: float) -> int:
    """How many of the first characters train; 0.1 keeps nanoGPT's `int(n * 0.9)`."""
    return int(characters * (1 - val_fraction))


def _characters(file: Path) -> Iterator[str]:
    """The file's text in blocks, line ends as "\\n", without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held = ""  # a "\r" at a block's end may be half of "\r\n"
    offset = 0
    try:
        with file.open("rb") as stream:
            while True:
                block = stream.read(PIECE)
                text = held + decoder.decode(block, final=not block)
                held = "\r" if block and text.endswith("\r") else ""
                text = text.removesuffix("\r") if held else text
                if text:
                    yield text.replace("\r\n", "\n").replace("\r", "\n")
                if not block:
                    return
                offset += len(block)
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise ElaraError(f"{file} is not UTF-8 text (near byte {place}): convert it to UTF-8 first") from error
    except OSError as error:
        raise ElaraError(f"cannot read {file}: {error.strerror or error}") from error


def _pieces(file: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Characters start..stop in pieces that end between two words, where there is such a place."""
    kept, position = "", 0
    for text in _characters(file):
        lower, upper = max(start - position, 0), len(text) if stop is None else stop - position
        position += len(text)
        kept += text[lower : max(upper, 0)]
        if len(kept) < PIECE:
            continue
        cuts = [match.start() for match in _WORD_START.finditer(kept, len(kept) - TAIL)]
        if cuts or len(kept) > 8 * PIECE:
            cut = cuts[-1] if cuts else len(kept)
            yield kept[:cut]
            kept = kept[cut:]
    if kept:
        yield kept
