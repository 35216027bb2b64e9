"""Building a tokenizer from its configuration, loading a saved one, refusing a mismatch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from elara.errors import ElaraError
from elara.tokenizer import smollm2
from elara.tokenizer.base import FORMAT_VERSION, META_FILE, Tokenizer
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer
from elara.tokenizer.config import TokenizerConfig
from elara.tokenizer.gpt2 import GPT2Tokenizer
from elara.tokenizer.huggingface import HuggingFaceTokenizer

_KINDS: dict[str, type[Tokenizer]] = {
    tokenizer.kind: tokenizer for tokenizer in (CharTokenizer, ByteTokenizer, GPT2Tokenizer, HuggingFaceTokenizer)
}


def build(config: TokenizerConfig, corpus: Callable[[], Iterable[str]], *, cache: Path) -> Tokenizer:
    """The tokenizer that a configuration asks for.

    Args:
        corpus: called by `char` only; all text that is to be encoded, in pieces.
        cache: folder for downloaded vocabulary files.

    Raises:
        ElaraError: unknown kind, missing path, unreachable or damaged files.
    """
    if config.kind == "char":
        characters: set[str] = set()
        for piece in corpus():
            characters.update(piece)
        return CharTokenizer(characters)
    if config.kind == "byte":
        return ByteTokenizer()
    if config.kind == "gpt2":
        return GPT2Tokenizer.fetch(cache, config.url)
    if config.kind == "huggingface":
        return HuggingFaceTokenizer.open(config.path, config.end_token)
    if config.kind == "smollm2":
        return smollm2.fetch(cache, config.url)
    if config.kind == "saved":
        return load(_saved_folder(config))
    raise _unknown(config.kind)


def identity(config: TokenizerConfig) -> dict[str, Any]:
    """What of a configuration changes the ids, without building it: part of the key of prepared data."""
    if config.kind == "huggingface":
        opened = HuggingFaceTokenizer.open(config.path, config.end_token)
        return {"kind": config.kind, "fingerprint": opened.fingerprint}
    if config.kind == "saved":
        meta = _read_meta(_saved_folder(config))
        return {"kind": meta["kind"], "fingerprint": meta["fingerprint"]}
    if config.kind == "smollm2":
        return {"kind": config.kind, "sha256": smollm2.FILE_SHA256}
    if config.kind not in _KINDS:
        raise _unknown(config.kind)
    return {"kind": config.kind}


def load(folder: Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote; ElaraError when a file is missing, changed or of a newer format."""
    meta = _read_meta(folder)
    kind = _KINDS[meta["kind"]]
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != META_FILE}
    try:
        tokenizer = kind._restore(files)
    except (KeyError, ValueError) as error:
        raise ElaraError(f"the tokenizer in {folder} is damaged ({error}): take another checkpoint") from error
    if tokenizer.fingerprint != meta["fingerprint"]:
        raise ElaraError(f"the tokenizer in {folder} was changed after it was saved: take another checkpoint")
    return tokenizer


def check_fingerprint(have: str, want: str, what: str = "the tokenizer") -> None:
    """Raise ElaraError unless two tokenizers encode alike; `what` names the one at hand in the message."""
    if have != want:
        raise ElaraError(
            f"{what} (fingerprint {have[:12]}) is not the one this was made with ({want[:12]}): "
            "use tokenizer=saved tokenizer.path=<checkpoint> to keep the checkpoint's own"
        )


def padded_vocab(size: int, multiple: int = 64) -> int:
    """Rows of an embedding for `size` ids: rounded up, so that matrix products stay aligned."""
    return -(-size // multiple) * multiple


def _unknown(kind: str) -> ElaraError:
    return ElaraError(f"tokenizer.kind={kind} is unknown: use {', '.join(_KINDS)}, smollm2 or saved")


def _saved_folder(config: TokenizerConfig) -> Path:
    if config.path is None:
        raise ElaraError("tokenizer=saved needs tokenizer.path=<a checkpoint or its tokenizer folder>")
    folder = Path(config.path).expanduser()
    return folder if (folder / META_FILE).exists() else folder / "tokenizer"


def _read_meta(folder: Path) -> dict[str, Any]:
    file = folder / META_FILE
    try:
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version, kind, _ = meta["format_version"], meta["kind"], meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = type(error).__name__
        raise ElaraError(f"no readable tokenizer in {folder} ({reason}): {META_FILE} is needed") from error
    if version != FORMAT_VERSION or kind not in _KINDS:
        raise ElaraError(f"the tokenizer in {folder} is of kind {kind}, format {version}: update Elara to read it")
    return meta
