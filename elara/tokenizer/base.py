"""What every tokenizer shares: reserved ids, chat template, streaming decoder, fingerprint, saving."""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from elara.errors import ElaraError

ROLES = ("system", "user", "assistant", "tool")
META_FILE = "elara_tokenizer.json"
FORMAT_VERSION = 1

Ids = NDArray[np.uint32]


class TextError(ElaraError):
    """A text that a tokenizer cannot keep as it is; the sentence names the first place where.

    before, after: the sentence around `position N`. position: of the first character in question, from 0. place: what
    the text is, if that is known: a file, a message of a sample.
    """

    def __init__(self, before: str, position: int, after: str, place: str = "") -> None:
        super().__init__(f"{before}position {position}{place and f' of {place}'}{after}")
        self.before, self.position, self.after, self.place = before, position, after, place

    def __reduce__(self) -> tuple[Any, ...]:
        return TextError, (self.before, self.position, self.after, self.place)

    def within(self, place: str, start: int = 0) -> TextError:
        """The same error, where the text is a part of `place` that begins at its character `start`."""
        whole = f"{self.place} of {place}" if self.place else place
        return TextError(self.before, self.position + start, self.after, whole)

    @classmethod
    def surrogate(cls, error: UnicodeEncodeError) -> TextError:
        """Half a character, which no tokenizer reads: JSON has it as an escape that was cut in two."""
        return cls("the text is not valid Unicode (lone surrogate at ", error.start, "): mend or leave it out")


class StreamDecoder(Protocol):
    """Turns ids into text one by one; the pieces joined equal `Tokenizer.decode` of all ids."""

    def feed(self, token: int) -> str:
        """Text that became certain with this id; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end (U+FFFD for an incomplete character)."""
        ...


class Tokenizer(ABC):
    """Text <-> ids, with [MASK], roles and end of document above the plain vocabulary.

    Ids 0..plain_size-1 are the plain vocabulary, then mask, system, user, assistant, tool and, unless the plain
    vocabulary has one, end. `vocab_size` counts all ids in use; the model pads it (`padded_vocab`). Plain text never
    encodes to a reserved id. Decoding renders reserved ids as nothing and ids never given out as U+FFFD.
    `markers` are plain ids that stand for no text: special tokens of a vocabulary that others made.
    """

    kind: ClassVar[str]

    def __init__(self, plain_size: int, end_id: int | None = None) -> None:
        self.plain_size = plain_size
        self.mask_id = plain_size
        self.role_ids = {role: plain_size + 1 + i for i, role in enumerate(ROLES)}
        self.end_id = plain_size + 1 + len(ROLES) if end_id is None else end_id
        self.markers: frozenset[int] = frozenset()
        self.vocab_size = plain_size + 1 + len(ROLES) + (end_id is None)
        self.special_ids = {self.mask_id: "mask", **{i: role for role, i in self.role_ids.items()}, self.end_id: "end"}

    @abstractmethod
    def encode_array(self, text: str) -> Ids:
        """Ids of plain text as uint32; the fast path of data preparation.

        Raises:
            ElaraError: the text has a character that the vocabulary lacks.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """A fresh decoder that never splits a character."""

    @abstractmethod
    def _files(self) -> dict[str, bytes]:
        """Everything `_restore` needs, by file name; all of it enters the fingerprint."""

    @classmethod
    @abstractmethod
    def _restore(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """Inverse of `_files`."""

    def encode_exactly(self, text: str, *, before: str = "") -> Ids:
        """Ids of a text that is learned from or measured on: decoding gives back this very text, or there are none.

        before: the character that stands before the text, where it is a later part of one; some tokenizers write the
        start of a text otherwise.

        Raises:
            TextError: the tokenizer does not keep the text; names the first place and what is lost.
        """
        return self.encode_array(text)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; raises ElaraError for a character that the vocabulary lacks."""
        return self.encode_array(text).tolist()  # type: ignore[no-any-return]

    def apply_chat(
        self, messages: Sequence[Mapping[str, str]], *, generate: bool = False, exact: bool = False
    ) -> tuple[list[int], list[bool]]:
        """A conversation as `role text end role text end ...`.

        Args:
            messages: each with `role` (system, user, assistant, tool) and `content`.
            generate: append the assistant's role id, so that the model answers next.
            exact: for what is learned or measured, see `encode_exactly`.

        Returns:
            ids and a mask of the same length: True for ids to be learned (the assistant's text and its end).

        Raises:
            ElaraError: unknown role or missing content; with `exact`, contents that the tokenizer does not keep.
        """
        ids: list[int] = []
        learn: list[bool] = []
        for number, message in enumerate(messages, 1):
            role, content = message.get("role"), message.get("content")
            if role not in self.role_ids:
                raise ElaraError(f"unknown role {role!r} in a message: use one of {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise ElaraError(f"a message of role {role} has no text under 'content'")
            try:
                text = self.encode_exactly(content).tolist() if exact else self.encode(content)
            except TextError as error:
                raise error.within(f"message {number}") from error
            ids += [self.role_ids[role], *text, self.end_id]
            learn += [False] + [role == "assistant"] * (len(text) + 1)
        if generate:
            ids.append(self.role_ids["assistant"])
            learn.append(False)
        return ids, learn

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over all that changes ids: equal fingerprints encode and decode alike."""
        digest = hashlib.sha256(json.dumps(self._meta(), sort_keys=True).encode())
        for name, data in sorted(self._files().items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder` (made when missing); `elara.tokenizer.load` reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files().items():
            (folder / name).write_bytes(data)
        meta = {**self._meta(), "fingerprint": self.fingerprint}
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    def _meta(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "special_ids": {"mask": self.mask_id, **self.role_ids, "end": self.end_id},
        }


class ByteDecoding(Tokenizer):
    """Tokenizers whose ids each stand for fixed bytes."""

    def __init__(self, token_bytes: Sequence[bytes], end_id: int | None = None) -> None:
        super().__init__(len(token_bytes), end_id)
        self._bytes = list(token_bytes) + [b""] * (self.vocab_size - len(token_bytes))
        self._bytes[self.end_id] = b""

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one id: nothing for reserved ids, U+FFFD for ids outside the vocabulary."""
        return self._bytes[token] if 0 <= token < self.vocab_size else b"\xef\xbf\xbd"

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(token) for token in ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        return _BytesStream(self)


class _BytesStream:
    def __init__(self, tokenizer: ByteDecoding) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
