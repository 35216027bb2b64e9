"""Any Hugging Face `tokenizer.json`, through the `tokenizers` package (extra `hub`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from elara.errors import ElaraError
from elara.tokenizer.base import Ids, StreamDecoder, TextError, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILE = "tokenizer.json"
END_FILE = "end_token.txt"
SHOWN = 16  # characters of a text that a message shows


class HuggingFaceTokenizer(Tokenizer):
    """Our reserved ids follow the file's own; its special tokens written in text stay plain text."""

    kind = "huggingface"

    def __init__(self, data: bytes, end_token: str | None = None) -> None:
        self._data, self._end_token = data, end_token
        self._backend = _backend(data)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if end_token is not None and end_token not in vocabulary:
            raise ElaraError(f"tokenizer.end_token={end_token!r} is not a token of this tokenizer.json")
        plain_size = max(vocabulary.values()) + 1
        super().__init__(plain_size, None if end_token is None else vocabulary[end_token])
        added = self._backend.get_added_tokens_decoder()
        self.markers = frozenset(token for token, about in added.items() if about.special)

    def encode_array(self, text: str) -> Ids:
        return np.array(self._plain_ids(text), dtype=np.uint32)

    def encode_exactly(self, text: str, *, before: str = "") -> Ids:
        if before:  # a start of its own could get a space that is not there, or lose one
            first, both = self._plain_ids(before), self._plain_ids(before + text)
            if both[: len(first)] == first and self._spelled(both) == before + text:
                return np.array(both[len(first) :], dtype=np.uint32)
        ids = self._plain_ids(text)
        if (back := self._spelled(ids)) != text:
            raise _lost(text, back)
        return np.array(ids, dtype=np.uint32)

    def _plain_ids(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError as error:
            raise TextError.surrogate(error) from error

    def _spelled(self, ids: list[int]) -> str:
        """What `decode` gives, in one call of the library where no id stands for an end."""
        return self.decode(ids) if self.end_id in ids else self._backend.decode(ids, skip_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        stream = self.stream_decoder()
        return "".join([stream.feed(token) for token in ids]) + stream.flush()

    def stream_decoder(self) -> StreamDecoder:
        return _WindowStream(self)

    def has(self, token: str) -> bool:
        """Whether the file's own vocabulary has a token of this name."""
        return self._backend.token_to_id(token) is not None

    def _files(self) -> dict[str, bytes]:
        end = {} if self._end_token is None else {END_FILE: self._end_token.encode()}
        return {TOKENIZER_FILE: self._data, **end}

    @classmethod
    def _restore(cls, files: Mapping[str, bytes]) -> HuggingFaceTokenizer:
        return cls(files[TOKENIZER_FILE], files[END_FILE].decode() if END_FILE in files else None)

    @classmethod
    def open(cls, path: str | None, end_token: str | None = None) -> HuggingFaceTokenizer:
        """Read a tokenizer.json, given as the file or its folder."""
        if path is None:
            raise ElaraError("tokenizer=huggingface needs tokenizer.path=<a tokenizer.json or its folder>")
        file = Path(path).expanduser()
        file = file / TOKENIZER_FILE if file.is_dir() else file
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ElaraError(f"cannot read tokenizer.path={path}: {error.strerror or error}") from error
        return cls(data, end_token)


def _lost(text: str, back: str) -> TextError:
    """Where a text and what comes back of it part."""
    at = next((i for i, (one, other) in enumerate(zip(text, back, strict=False)) if one != other),
              min(len(text), len(back)))  # fmt: skip
    given, got = text[at : at + SHOWN] or "its end", back[at : at + SHOWN]
    after = f"): it gives back {got!r} for {given!r}; take one that keeps it, as byte or gpt2 do, or change the text"
    return TextError("this tokenizer loses text (", at, after)


class _WindowStream:
    """Decodes a short window again with each id, since some decoders look at the neighbours."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._prefix = 0  # ids before the ones whose text is still open, given as context
        self._read = 0  # ids whose text was handed out

    def feed(self, token: int) -> str:
        tokenizer = self._tokenizer
        if token >= tokenizer.vocab_size:
            return self.flush() + "\ufffd"
        if token in tokenizer.special_ids:
            return ""
        self._ids.append(token)
        piece = self._open_text()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._read :]
        self._prefix, self._read = 0, len(self._ids)
        return piece

    def flush(self) -> str:
        piece = self._open_text()
        self._ids, self._prefix, self._read = [], 0, 0
        return piece

    def _open_text(self) -> str:
        decode = self._tokenizer._backend.decode
        known = decode(self._ids[self._prefix : self._read], skip_special_tokens=False)
        return str(decode(self._ids[self._prefix :], skip_special_tokens=False)[len(known) :])


def _backend(data: bytes) -> Backend:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ElaraError("tokenizer=huggingface needs an extra: pip install 'elara-hivemind[hub]'") from error
    try:
        backend = Backend.from_str(data.decode("utf-8"))
    except Exception as error:  # the package raises bare Exception
        reason = str(error)[:120]
        raise ElaraError(f"this is not a tokenizer.json ({reason}): give tokenizer.path another file") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
