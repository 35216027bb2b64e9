"""A prompt as a message: what decoding needs of a tokenizer, for models that answer in conversations."""

from __future__ import annotations

from elara.tokenizer import Tokenizer


class Conversation:
    """A tokenizer for which a prompt is the user's message, to be answered next. system: the message before it."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.vocab_size, self.mask_id, self.end_id = tokenizer.vocab_size, tokenizer.mask_id, tokenizer.end_id
        self.role_ids, self.stream_decoder = tokenizer.role_ids, tokenizer.stream_decoder
        self._tokenizer = tokenizer
        self._before = [] if system is None else [{"role": "system", "content": system}]

    def encode(self, text: str) -> list[int]:
        """The conversation up to where the assistant's words begin."""
        return self._tokenizer.apply_chat([*self._before, {"role": "user", "content": text}], generate=True)[0]
