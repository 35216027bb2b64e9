"""Which answers say what an earlier one said: equal text, or most of its word triples (MinHash, Broder 1997)."""

from __future__ import annotations

import re
import zlib

import numpy as np
from numpy.typing import NDArray

from elara.data.hashes import digest

LONG = 40  # characters from which an answer may not come back for another question; "Yes." may
HASHES = 128  # a similarity of 0.8 is estimated with a standard error of 0.035
BANDS, ROWS = 16, 4  # answers that share a band are compared: of similarity 0.8 all but 2 in 10,000, of 0.5 two thirds
PRIME = (1 << 31) - 1

_random = np.random.default_rng(0)
_FACTORS = _random.integers(1, PRIME, (HASHES, 1), dtype=np.uint64)
_SHIFTS = _random.integers(0, PRIME, (HASHES, 1), dtype=np.uint64)


class Duplicates:
    """Remembers answers, of each about 2 kB where near ones count."""

    def __init__(self, near: bool, similarity: float) -> None:
        self._near, self._similarity = near, similarity
        self._exact: set[str] = set()  # hashes
        self._signatures: list[NDArray[np.uint32]] = []
        self._bands: dict[tuple[int, bytes], int] = {}  # the first answer with it

    def kind(self, answer: str, prompt: str) -> str | None:
        """`duplicate`, `near_duplicate` or None, and then it is remembered. prompt: id of what was asked."""
        normal = " ".join(re.findall(r"\w+", answer.casefold())) or answer
        key = digest([normal] if len(normal) >= LONG else [normal, prompt])
        if key in self._exact:
            return "duplicate"
        if self._near and len(normal) >= LONG:
            signature = minhash(normal)
            bands = [(i, signature[i * ROWS : (i + 1) * ROWS].tobytes()) for i in range(BANDS)]
            for other in {self._bands[band] for band in bands if band in self._bands}:
                if (self._signatures[other] == signature).mean() >= self._similarity:
                    return "near_duplicate"
            for band in bands:
                self._bands.setdefault(band, len(self._signatures))
            self._signatures.append(signature)
        self._exact.add(key)
        return None


def minhash(text: str) -> NDArray[np.uint32]:
    """Signature of a text's word triples: the share of equal entries of two estimates |common| / |all| of them."""
    words = text.split()
    triples = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    hashes = np.fromiter((zlib.crc32(t.encode()) & PRIME for t in triples), np.uint64, len(triples))
    signature: NDArray[np.uint32] = ((_FACTORS * hashes + _SHIFTS) % PRIME).min(1).astype(np.uint32)
    return signature
