"""Which answers say what an earlier one said: equal text, or most of its word triples (MinHash, Broder 1997)."""

from __future__ import annotations

import re
import zlib

import numpy as np
from numpy.typing import NDArray

LONG = 40  # characters from which an answer may not come back for another question; "Yes." may
BANDS, ROWS = 32, 4  # a pair of similarity 0.8 shares a band with probability 1 - (1 - 0.8^4)^32 > 0.99999
PRIME = (1 << 31) - 1

_random = np.random.default_rng(0)
_FACTORS = _random.integers(1, PRIME, (BANDS * ROWS, 1), dtype=np.uint64)
_SHIFTS = _random.integers(0, PRIME, (BANDS * ROWS, 1), dtype=np.uint64)


class Duplicates:
    """Remembers answers; 512 bytes each where near ones count, besides the dictionaries' own."""

    def __init__(self, near: bool, similarity: float) -> None:
        self._near, self._similarity = near, similarity
        self._exact: set[str | tuple[str, str]] = set()
        self._signatures: list[NDArray[np.uint32]] = []
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]

    def kind(self, answer: str, prompt: str) -> str | None:
        """`duplicate`, `near_duplicate` or None, and then it is remembered. prompt: id of what was asked."""
        normal = " ".join(re.findall(r"\w+", answer.casefold())) or answer
        key = normal if len(normal) >= LONG else (prompt, normal)
        if key in self._exact:
            return "duplicate"
        if self._near and len(normal) >= LONG:
            signature = minhash(normal)
            bands = [signature[i * ROWS : (i + 1) * ROWS].tobytes() for i in range(BANDS)]
            for other in {i for own, band in zip(self._bands, bands, strict=True) for i in own.get(band, ())}:
                if (self._signatures[other] == signature).mean() >= self._similarity:
                    return "near_duplicate"
            for own, band in zip(self._bands, bands, strict=True):
                own.setdefault(band, []).append(len(self._signatures))
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
