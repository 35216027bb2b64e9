"""One id per byte of UTF-8: 256 ids for every text there is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from elara.tokenizer.base import ByteDecoding, Ids, TextError


class ByteTokenizer(ByteDecoding):
    """Ids are the bytes."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__([bytes([value]) for value in range(256)])

    def encode_array(self, text: str) -> Ids:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextError.surrogate(error) from error
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint32)

    def _files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def _restore(cls, files: Mapping[str, bytes]) -> ByteTokenizer:
        return cls()
