"""Tokenizers: char, byte, gpt2, any Hugging Face one; with reserved ids, chat template and fingerprint."""

from elara.tokenizer.base import ROLES, Ids, StreamDecoder, TextError, Tokenizer
from elara.tokenizer.config import TokenizerConfig
from elara.tokenizer.store import build, check_fingerprint, identity, load, padded_vocab

__all__ = [
    "ROLES",
    "Ids",
    "StreamDecoder",
    "TextError",
    "Tokenizer",
    "TokenizerConfig",
    "build",
    "check_fingerprint",
    "identity",
    "load",
    "padded_vocab",
]
