"""Text in, text out: generation for callers who hold a tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from elara.config import SamplingConfig
from elara.decoding.controller import Controller
from elara.decoding.generation import generate
from elara.decoding.prefix import Prefixes
from elara.model import ElaraLM


class StreamDecoder(Protocol):
    """Turns ids into text one by one, holding back bytes that are not a whole character yet."""

    def feed(self, id: int, /) -> str: ...
    def flush(self) -> str: ...


class TextCodec(Protocol):
    """What decoding needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def end_id(self) -> int: ...
    @property
    def role_ids(self) -> dict[str, int]: ...
    def encode(self, text: str, /) -> list[int]: ...
    def stream_decoder(self) -> StreamDecoder: ...


@dataclass
class Completion:
    """text: what was written, without the prompt. tokens: how many (the end token included) in how many `forwards`.
    seconds: wall time, reading the prompt included."""

    text: str
    tokens: int
    forwards: int
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def writable(tokenizer: TextCodec, vocab_size: int) -> Tensor:
    """Boolean (vocab_size): the ids that text consists of and end_id; without [MASK], the roles and the padding."""
    allowed = torch.arange(vocab_size) < tokenizer.vocab_size
    allowed[[tokenizer.mask_id, *tokenizer.role_ids.values()]] = False
    allowed[tokenizer.end_id] = True
    return allowed


def encode_prompt(tokenizer: TextCodec, prompt: str) -> list[int]:
    """The ids of a prompt; an empty one begins a new document."""
    return tokenizer.encode(prompt) or [tokenizer.end_id]


def complete(
    model: ElaraLM,
    tokenizer: TextCodec,
    prompt: str,
    sampling: SamplingConfig,
    *,
    depth: int | None = None,
    controller: Controller | None = None,
    prefixes: Prefixes | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """Continue `prompt` until the end token, a stop token or `max_new_tokens`.

    on_text is called with each piece of text as it is written. Special tokens other than the end are never drawn.
    Raises ElaraError as `generate` does.
    """
    started = time.perf_counter()
    steps = generate(
        model,
        [encode_prompt(tokenizer, prompt)],
        replace(sampling, stop=[*sampling.stop, tokenizer.end_id]),
        allowed=writable(tokenizer, model.config.vocab_size),
        mask_id=tokenizer.mask_id,
        depth=depth,
        controller=controller,
        prefixes=prefixes,
    )
    decoder = tokenizer.stream_decoder()
    pieces: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if on_text is not None and piece:
            on_text(piece)

    count = forwards = 0
    for step in steps:
        forwards += 1
        count += len(step.tokens[0])
        for token in step.tokens[0]:
            if token != tokenizer.end_id:
                write(decoder.feed(token))
    write(decoder.flush())
    return Completion("".join(pieces), count, forwards, time.perf_counter() - started)
