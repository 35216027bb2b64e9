"""One id per character of the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np

from elara.tokenizer.base import ByteDecoding, Ids, TextError

_UNKNOWN = np.uint32(0xFFFFFFFF)


class CharTokenizer(ByteDecoding):
    """Ids in the order of the characters' code points."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        super().__init__([c.encode("utf-8") for c in self.characters])
        points = _code_points(self.characters)
        self._table = np.full(int(points.max(initial=0)) + 2, _UNKNOWN, np.uint32)  # the last entry is never known
        self._table[points] = np.arange(len(points), dtype=np.uint32)

    def encode_array(self, text: str) -> Ids:
        points = _code_points(text)
        ids: Ids = self._table[np.minimum(points, len(self._table) - 1)]
        if (unknown := ids == _UNKNOWN).any():
            at = int(unknown.argmax())
            after = f") is not in the vocabulary of {len(self.characters)} characters"
            advice = "leave it out or use tokenizer=byte"
            raise TextError(f"character {text[at]!r} (U+{ord(text[at]):04X}, ", at, f"{after}: {advice}")
        return ids

    def _files(self) -> dict[str, bytes]:
        return {"characters.json": json.dumps(self.characters).encode()}

    @classmethod
    def _restore(cls, files: Mapping[str, bytes]) -> CharTokenizer:
        return cls(json.loads(files["characters.json"]))


def _code_points(text: str) -> Ids:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
