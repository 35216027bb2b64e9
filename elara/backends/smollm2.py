"""SmolLM2-135M-Instruct, the teacher that is always there: from a pinned package archive, without hub or server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elara.archives import SMOLLM2
from elara.backends.conversion import converted
from elara.backends.transformers import Transformers
from elara.runs import project_root
from elara.tokenizer import smollm2
from elara.tokenizer.huggingface import HuggingFaceTokenizer

MODEL = "SmolLM2-135M-Instruct"


class SmolLM2(Transformers):
    """See Transformers. url: where to get the archive from instead of the package index: address or path."""

    kind = "smollm2"

    def __init__(
        self,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        cache: str | None = None,
        url: str | None = None,
    ) -> None:
        super().__init__(MODEL, device=device, dtype=dtype, batch_size=batch_size, cache=cache)
        self.url = url

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": MODEL, "revision": SMOLLM2.sha256, "dtype": self.dtype}

    def _read_tokenizer(self) -> HuggingFaceTokenizer:
        return smollm2.fetch(_archives(), self.url)

    def _folder(self) -> Path:
        def get(folder: Path) -> Path:
            return smollm2.extract(folder, _archives(), self.url)

        tokenizer = smollm2.fetch_file(_archives(), self.url).read_bytes()
        return converted(self.cache / "smollm2", get, tokenizer)


def _archives() -> Path:
    return project_root() / "data" / "archives"
