"""A checkpoint of this project as a teacher or queen: what it answers is what `elara.decoding` writes."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from elara import checkpoint as checkpoints
from elara.backends.base import Answer, BackendError, Capabilities, Messages, Params, TokenChoice, TopLogprobs
from elara.backends.local import (
    READ_AT_ONCE,
    TOKEN_LOGPROBS,
    check_ids,
    choices,
    free,
    last_text,
    memory_explained,
    no_memory,
    out_of_memory,
    sampling_of,
    seed_of,
    top_of,
)
from elara.backends.places import digest_of
from elara.backends.stopping import StopText
from elara.checkpoint import Loaded
from elara.config import PRECISIONS
from elara.decoding import Server, encode_prompt, writable
from elara.device import find_device
from elara.errors import ElaraError, NotFinite, naming
from elara.runs import find_checkpoint
from elara.tokenizer import Tokenizer

MODES = ("auto", "ar", "tidar")


class Elara:
    """See Backend. checkpoint: a folder, a run's folder or name, default the newest run. precision, depth: as for
    `elara.sample`. mode: ar or tidar, the latter at the trained draft length; auto is ar. batch_size: answers written
    together. Without a chat template of its own (`"chat": true` in meta.json) it continues the last message."""

    def __init__(
        self,
        checkpoint: str | None = None,
        device: str = "auto",
        precision: str = "float32",
        mode: str = "auto",
        depth: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if precision not in PRECISIONS:
            raise ElaraError(f"precision={precision} must be one of: {', '.join(PRECISIONS)}")
        if mode not in MODES:
            raise ElaraError(f"mode={mode} must be one of: {', '.join(MODES)}")
        if batch_size < 1:
            raise ElaraError(f"batch_size={batch_size} must be at least 1")
        self.checkpoint, self.device, self.precision = checkpoint, device, precision
        self.mode, self.depth, self.batch_size = mode, depth, batch_size
        self._folder: Path | None = None
        self._loaded: Loaded | None = None
        self._server: Server | None = None
        self._lock = threading.RLock()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(logits=True, token_logprobs=TOKEN_LOGPROBS, embeddings=True, concurrency=self.batch_size)

    @property
    def fingerprint(self) -> str:
        return self.tokenizer().fingerprint

    def tokenizer(self) -> Tokenizer:
        folder = self._place()
        return checkpoints.read_tokenizer(folder, checkpoints.read_meta(folder))

    def identity(self) -> dict[str, Any]:
        folder = self._place()
        parts = [folder / checkpoints.CONFIG, folder / checkpoints.WEIGHTS]
        parts += [*(folder / checkpoints.SHARDS).glob("*"), *(folder / checkpoints.TOKENIZER).glob("*")]
        return {
            "kind": "elara",
            "model": "/".join(folder.parts[-4:]),
            "revision": digest_of(parts, folder),
            "precision": self.precision,
            "depth": self.depth,
        }

    def generate(self, messages: Messages, params: Params) -> Iterator[str]:
        with memory_explained(), naming(self._place()):
            yield from self._write(messages, params)

    def answers(self, conversations: Sequence[Messages], params: Params) -> Iterator[tuple[int, Answer | BackendError]]:
        self._serving()
        dropped = threading.Event()

        def answer(i: int) -> Answer | BackendError:
            writing = self._write(conversations[i], params)
            try:
                with naming(self._place()):
                    while not dropped.is_set():
                        next(writing)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            except BackendError as error:
                return error
            except Exception as error:
                if out_of_memory(error):
                    return no_memory()
                raise
            return BackendError("empty", "nobody waits for this answer any more")

        waiting = iter(range(len(conversations)))
        with ThreadPoolExecutor(self.batch_size, "elara-answers") as pool:
            running = {pool.submit(answer, i): i for i in islice(waiting, self.batch_size)}
            try:
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        i = running.pop(future)
                        running |= {pool.submit(answer, k): k for k in islice(waiting, 1)}
                        yield i, future.result()
            finally:
                dropped.set()

    def frame(self, roles: Sequence[str]) -> list[list[int]]:
        folder = self._place()
        if not checkpoints.read_meta(folder).get("chat"):
            raise BackendError("refused", f"{folder} has not learned to chat")
        tokenizer = self.tokenizer()
        before = [[tokenizer.end_id] * (i > 0) + [tokenizer.role_ids[role]] for i, role in enumerate(roles)]
        return [*before, [tokenizer.end_id]]

    def top_logprobs(self, ids: Tensor, k: int, temperature: float = 1.0) -> TopLogprobs:
        model = self._ready().model
        check_ids(ids, model.config.vocab_size, model.config.model.context_length)
        parts = ids.to(model.embed.weight.device).split(max(1, READ_AT_ONCE // ids.shape[1]))
        with memory_explained(), torch.no_grad():
            hidden = (model(part, depth=self.depth).hidden.flatten(0, 1) for part in parts)
            return top_of(hidden, model.ar_head, k, ids, temperature)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The mean of the last hidden states over a text's tokens, at unit length."""
        loaded = self._ready()
        model, context = loaded.model, loaded.config.model.context_length
        ids = [encode_prompt(loaded.tokenizer, text)[:context] for text in texts]
        vectors = torch.zeros(len(ids), loaded.config.model.n_embd)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with memory_explained(), torch.no_grad():
            while order:
                longest = len(ids[order[-1]])
                count = max(1, READ_AT_ONCE // longest)
                part, order = order[-count:], order[:-count]
                # padding stands behind, where no token of the text looks
                tokens = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in part])
                hidden = model(tokens.to(model.embed.weight.device), depth=self.depth).hidden.float()
                for i, row in zip(part, hidden, strict=True):
                    vectors[i] = F.normalize(row[: len(ids[i])].mean(0), dim=0).cpu()
        if not vectors.isfinite().all():
            with naming(self._place()):
                raise NotFinite
        return vectors.numpy()

    def close(self) -> None:
        with self._lock:
            if self._server is not None:
                self._server.close()
            self._server = self._loaded = None
        free()

    def _place(self) -> Path:
        """The checkpoint's folder; which one is the newest is asked once."""
        with self._lock:
            if self._folder is None:
                self._folder = find_checkpoint(self.checkpoint).resolve()
            return self._folder

    def _ready(self) -> Loaded:
        with self._lock:
            if self._loaded is None:
                with memory_explained():
                    device = find_device(self.device)
                    self._loaded = checkpoints.load(self._place(), device=device, precision=self.precision)
            return self._loaded

    def _serving(self) -> Server:
        with self._lock:
            if self._server is None:
                loaded = self._ready()
                self._server = Server(
                    loaded.model,
                    slots=self.batch_size,
                    mask_id=loaded.tokenizer.mask_id,
                    allowed=writable(loaded.tokenizer, loaded.config.vocab_size),
                    depth=self.depth,
                )
            return self._server

    def _prompt(self, messages: Messages) -> list[int]:
        loaded, text = self._ready(), last_text(messages)
        try:
            if loaded.meta.get("chat"):
                ids, _ = loaded.tokenizer.apply_chat(messages, generate=True)
            else:
                ids = encode_prompt(loaded.tokenizer, text)
        except ElaraError as error:
            raise BackendError("unfit", str(error)) from error
        if len(ids) >= (context := loaded.config.model.context_length):
            raise BackendError("unfit", f"the prompt has {len(ids)} tokens, the model's context holds {context}")
        return ids

    def _write(self, messages: Messages, params: Params) -> Generator[str, None, Answer]:
        """An answer in pieces, and at the end as a whole."""
        server, loaded, prompt = self._serving(), self._ready(), self._prompt(messages)
        end = loaded.tokenizer.end_id
        sampling = replace(sampling_of(params), stop=[end], seed=seed_of(params, prompt))
        if params.logprobs:  # they are read off one forward at the end, which the context must hold
            room = loaded.config.model.context_length - len(prompt)
            sampling = replace(sampling, max_new_tokens=min(params.max_new_tokens, room))
        stream, decoder = server.submit(prompt, sampling, self.mode), loaded.tokenizer.stream_decoder()
        until, written, starts, text, finish = StopText(params.stop), list[int](), list[int](), "", "length"
        try:
            for token in stream:
                if token == end:
                    finish = "stop"
                    break
                written.append(token)
                starts.append(until.fed)
                if piece := until.feed(decoder.feed(token)):
                    text += piece
                    yield piece
                if until.met:
                    finish = "stop"
                    break
        except RuntimeError:  # the server failed: the next answer gets a fresh one
            with self._lock:
                self._server = None if self._server is server else self._server
            raise
        tail = decoder.flush().rstrip("\ufffd")  # a character that was cut off is left out
        if not until.met and (piece := until.feed(tail) + until.flush()):
            text += piece
            yield piece
        if not text.strip():
            raise BackendError("empty", "the model wrote nothing: raise max_new_tokens or ask otherwise")
        kept = sum(at < len(text) for at in starts) if until.met else len(written)  # tokens of a stop text are left out
        tokens = self._choices(prompt, written[:kept], params.logprobs) if params.logprobs else []
        return Answer(text, finish, tuple(tokens))

    def _choices(self, prompt: list[int], written: list[int], k: int) -> list[TokenChoice]:
        """The written tokens with their log-probabilities, by one forward over all of the text."""
        loaded = self._ready()
        model = loaded.model
        ids = torch.tensor([[*prompt, *written]], device=model.embed.weight.device)
        with torch.no_grad():
            hidden = model(ids, depth=self.depth).hidden[0, len(prompt) - 1 : -1]
            return choices(model.ar_head(hidden), written, k, lambda token: loaded.tokenizer.decode([token]))
