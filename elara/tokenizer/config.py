"""The tokenizer's configuration: Hydra schema of the group `tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TokenizerConfig:
    """Which tokenizer turns the corpus into ids."""

    kind: str = "char"  # char | byte | gpt2 | smollm2 | huggingface | saved
    path: str | None = None  # huggingface: a tokenizer.json or its folder; saved: a checkpoint or its tokenizer folder
    end_token: str | None = None  # huggingface: existing token that ends a document; null = add one of our own
    url: str | None = None  # gpt2: address or path of vocab.bpe; smollm2: of the archive; null = the package index
