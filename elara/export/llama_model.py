"""A GGUF file in llama.cpp: tokens to logits, with a float32 KV cache and without flash attention."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elara.errors import ElaraError
from elara.export.llama_abi import ModelParams
from elara.export.llama_cpp import Library, threads

F32 = 0  # of ggml_type; llama.cpp's own default for the cache, F16, alone moves logits by 3e-3
CPU_ONLY, DISABLED = 0, 0  # n_gpu_layers, flash_attn_type


class LlamaModel:
    """One file, loaded; close it, or use it in `with`."""

    def __init__(self, library: Library, path: Path, context: int) -> None:
        """context: tokens that the KV cache holds. Raises ElaraError when llama.cpp does not take the file."""
        self._library, self._call = library, library.functions
        self._model: Any = None
        self._context: Any = None
        params = library.defaults("model", ModelParams)
        params.n_gpu_layers = CPU_ONLY
        library.complaint()
        self._model = self._call["llama_model_load_from_file"](os.fsencode(path), params)
        if not self._model:
            raise ElaraError(f"llama.cpp does not load {path}: {library.complaint()}")
        self._vocab = self._call["llama_model_get_vocab"](self._model)
        self.vocab_size: int = self._call["llama_vocab_n_tokens"](self._vocab)
        settings = library.defaults("context", library.context_params)
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self._capacity = context
        settings.type_k = settings.type_v = F32
        settings.flash_attn_type = DISABLED
        if hasattr(settings, "n_outputs_max_per_seq"):
            settings.n_outputs_max_per_seq = context
        self._context = self._call["llama_init_from_model"](self._model, settings)
        if not self._context:
            self.close()
            raise ElaraError(f"llama.cpp cannot run {path}: {library.complaint()}")
        count = threads()
        self._call["llama_set_n_threads"](self._context, count, count)
        self._length = 0

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Next-token logits behind each of `tokens`, read from the beginning: (tokens, vocab) float32."""
        self._call["llama_memory_clear"](self._call["llama_get_memory"](self._context), True)
        self._length = 0
        return self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The same for tokens behind those read before. Raises ElaraError when the cache is full."""
        if self._length + len(tokens) > self._capacity:
            raise ElaraError(f"the KV cache holds {self._capacity} tokens, and more are asked for")
        batch = self._call["llama_batch_init"](len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, self._length + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if code := self._call["llama_decode"](self._context, batch):
                raise ElaraError(f"llama.cpp stops with code {code}: {self._library.complaint()}")
            rows = (self._call["llama_get_logits_ith"](self._context, i) for i in range(len(tokens)))
            found = np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in rows])
        finally:
            self._call["llama_batch_free"](batch)
        self._length += len(tokens)
        return found

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The likeliest `count` tokens behind a prompt, one at a time."""
        written = [int(self.logits(prompt)[-1].argmax())]
        while len(written) < count:
            written.append(int(self.extend(written[-1:])[-1].argmax()))
        return written

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text by the file's own tables. special: read the names of control tokens as such."""
        data = text.encode("utf-8")
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self._call["llama_tokenize"](self._vocab, data, len(data), room, len(room), False, special)
        return list(room[:count])

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for control tokens."""
        room = ctypes.create_string_buffer(256)
        count = self._call["llama_token_to_piece"](self._vocab, token, room, len(room), 0, False)
        return room.raw[: max(count, 0)]

    def ends(self, token: int) -> bool:
        """Whether llama.cpp stops writing at this token."""
        return bool(self._call["llama_vocab_is_eog"](self._vocab, token))

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            self._call["llama_free"](self._context)
        if self._model:
            self._call["llama_model_free"](self._model)
        self._context = self._model = None

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
