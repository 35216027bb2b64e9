"""Any causal language model that transformers runs: a local folder, a name on the hub, a GGUF file."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elara.backends.base import Answer, BackendError, Capabilities, Messages, Params, TopLogprobs
from elara.backends.causal import Causal, frame
from elara.backends.conversion import TOKENIZER_FILE, converted
from elara.backends.local import READ_AT_ONCE, TOKEN_LOGPROBS, free, memory_explained, no_memory, out_of_memory
from elara.backends.places import brief, find_folder, library, pretrained, revision_of
from elara.data.hashes import file_hash
from elara.device import find_device
from elara.errors import ElaraError
from elara.runs import project_root
from elara.tokenizer.huggingface import HuggingFaceTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # of GPT-2, Llama 3, Llama 2, Gemma


class Transformers:
    """See Backend.

    model: a folder, a .gguf file or a name on the hub. gguf_file: a file in that folder or repository. revision: of the
    hub. dtype: float32, bfloat16, float16 or auto, the fastest here that is exact enough. batch_size: answers written
    together. cache: where converted GGUF files are kept, default data/teachers. end_token: what ended a document in the
    model's training, default the first known one of its vocabulary.
    """

    kind = "transformers"
    read_at_once = READ_AT_ONCE

    def __init__(
        self,
        model: str | None,
        gguf_file: str | None = None,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        cache: str | None = None,
        end_token: str | None = None,
    ) -> None:
        if not model:
            raise ElaraError(f"teacher={self.kind} needs teachers.{self.kind}.backend.model=<a folder or hub name>")
        if dtype != "auto" and dtype not in DTYPES:
            raise ElaraError(f"dtype={dtype} must be one of: auto, {', '.join(DTYPES)}")
        if batch_size < 1:
            raise ElaraError(f"batch_size={batch_size} must be at least 1")
        if gguf_file is None and model.endswith(".gguf"):
            model, gguf_file = str(Path(model).parent), Path(model).name
        self.model, self.gguf_file, self.revision = model, gguf_file, revision
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.cache = Path(cache).expanduser() if cache else project_root() / "data" / "teachers"
        self.end_token = end_token
        self._at_once = batch_size  # less once memory did not suffice
        self._place: tuple[Path, str | None] | None = None
        self._ours: HuggingFaceTokenizer | None = None
        self._template: Any = None
        self._causal: Causal | None = None
        self._lock = threading.RLock()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(logits=True, token_logprobs=TOKEN_LOGPROBS, embeddings=True, concurrency=self.batch_size)

    @property
    def fingerprint(self) -> str:
        return self.tokenizer().fingerprint

    def tokenizer(self) -> HuggingFaceTokenizer:
        """Its tokenizer as Elara's students have it; loads no weights."""
        with self._lock:
            if self._ours is None:
                self._ours = self._read_tokenizer()
            return self._ours

    def identity(self) -> dict[str, Any]:
        folder, commit = self._source()
        revision = commit or revision_of(folder, self.gguf_file)
        model = self.model if commit else folder.name
        name = "/".join(filter(None, (model, self.gguf_file)))
        asked = {"dtype": self.dtype, "end_token": self.end_token}
        return {"kind": self.kind, "model": name, "revision": revision, **asked}

    def generate(self, messages: Messages, params: Params) -> Iterator[str]:
        causal = self._loaded()
        with memory_explained():
            for written, piece in causal.write([causal.prompt(messages)], params):
                if piece:
                    yield piece
                if written.finish and isinstance(failed := written.answer(), BackendError):
                    raise failed

    def answers(self, conversations: Sequence[Messages], params: Params) -> Iterator[tuple[int, Answer | BackendError]]:
        causal = self._loaded()
        prompts: dict[int, list[int]] = {}
        for i, messages in enumerate(conversations):
            try:
                prompts[i] = causal.prompt(messages)
            except BackendError as error:
                yield i, error
        waiting = sorted(prompts, key=lambda i: len(prompts[i]))  # alike in length beside each other: little padding
        while waiting:  # the longest first: what does not fit into memory shows at once
            batch = waiting[-self._at_once :]
            done: set[int] = set()
            try:
                for written, _ in causal.write([prompts[i] for i in batch], params):
                    if written.finish:
                        done.add(batch[written.key])
                        yield batch[written.key], written.answer()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                free()
                if len(batch) == 1:
                    done.add(batch[0])
                    yield batch[0], no_memory()
                self._at_once = max(1, len(batch) // 2)
            waiting = [i for i in waiting if i not in done]

    def frame(self, roles: Sequence[str]) -> list[list[int]]:
        return frame(self._theirs(), roles)

    def top_logprobs(self, ids: Tensor, k: int, temperature: float = 1.0) -> TopLogprobs:
        with memory_explained():
            return self._loaded().top_logprobs(ids, k, temperature)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with memory_explained():
            return self._loaded().embed(texts)

    def close(self) -> None:
        with self._lock:
            self._causal = None
        free()

    def _source(self) -> tuple[Path, str | None]:
        """The folder that `model` names, and its commit on the hub."""
        with self._lock:
            if self._place is None:
                library()
                self._place = find_folder(self.model, self.revision, self.gguf_file)
            return self._place

    def _folder(self) -> Path:
        """The folder that transformers loads."""
        folder, _ = self._source()
        if self.gguf_file is None:
            return folder
        file = folder / self.gguf_file
        if not file.is_file():
            raise BackendError("refused", f"there is no file {file}: check backend.gguf_file")
        digest = file_hash(file, project_root() / "data")[:12]
        return converted(self.cache / f"{file.stem}-{digest}", lambda _: file)

    def _read_tokenizer(self) -> HuggingFaceTokenizer:
        folder = self._folder()
        theirs = None
        if (file := folder / TOKENIZER_FILE).is_file():
            data = file.read_bytes()
        else:
            theirs = self._their_tokenizer(folder)
            if not getattr(theirs, "is_fast", False):
                raise BackendError(
                    "refused", f"{self.model} has no fast tokenizer: no tokenizer.json can be made of it"
                )
            data = theirs.backend_tokenizer.to_str().encode()
        if self.end_token is not None:
            return HuggingFaceTokenizer(data, self.end_token)
        plain = HuggingFaceTokenizer(data)
        theirs = theirs or self._their_tokenizer(folder)
        ends = (token for token in (*DOCUMENT_ENDS, theirs.eos_token) if token and plain.has(token))
        return HuggingFaceTokenizer(data, next(ends, None))

    def _theirs(self) -> Any:
        """transformers' own tokenizer, which knows the chat template; read once."""
        with self._lock:
            if self._template is None:
                self._template = self._their_tokenizer(self._folder())
            return self._template

    def _their_tokenizer(self, folder: Path) -> Any:
        try:
            return pretrained("AutoTokenizer", folder)
        except Exception as error:  # of many kinds, all about this folder
            raise BackendError("refused", f"transformers reads no tokenizer in {folder}: {brief(error)}") from error

    def _loaded(self) -> Causal:
        with self._lock:
            if self._causal is None:
                device = find_device(self.device)
                ours, folder = self.tokenizer(), self._folder()
                self._causal = Causal(self._open(folder, device), self._theirs(), ours, device, self.read_at_once)
            return self._causal

    def _open(self, folder: Path, device: torch.device) -> Any:
        """transformers' model, ready to run."""
        dtype = fastest(device) if self.dtype == "auto" else DTYPES[self.dtype]
        try:
            with torch.random.fork_rng(devices=[]):
                model = pretrained("AutoModelForCausalLM", folder, dtype=dtype)
            return model.to(device).eval()
        except Exception as error:
            if out_of_memory(error):
                raise no_memory() from error
            raise BackendError("refused", f"transformers cannot load {self.model}: {brief(error)}") from error


def fastest(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu.get_capabilities()
    return torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") else torch.float32
