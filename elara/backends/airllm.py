"""A model larger than memory: the package airllm reads it from disk layer by layer, for every forward anew.

Its log-probabilities are those of `Transformers`, its speed that of the disk; a batch shares each reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch

from elara.backends.base import BackendError
from elara.backends.places import brief, pretrained
from elara.backends.transformers import DTYPES, Transformers, fastest
from elara.errors import ElaraError

COMPRESSIONS = (None, "4bit", "8bit")
REPORT_EVERY = 60.0  # seconds between lines about a work that goes on


class AirLLM(Transformers):
    """See Transformers. compression: 4bit or 8bit layers on disk, for a GPU with the package bitsandbytes. shards:
    where the layers are kept, as large as the model; default data/teachers/airllm/<name>-<hash>. The model's own folder
    is only read. Code that a model brings along is never run."""

    kind = "airllm"
    read_at_once = 1 << 16  # tokens per forward: reading the layers is what costs

    def __init__(
        self,
        model: str | None,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        compression: str | None = None,
        batch_size: int = 64,
        shards: str | None = None,
        end_token: str | None = None,
    ) -> None:
        super().__init__(
            model, revision=revision, device=device, dtype=dtype, batch_size=batch_size, end_token=end_token
        )
        if self.gguf_file is not None:
            raise ElaraError(f"teacher=airllm reads safetensors, not {self.gguf_file}: take teacher=transformers")
        if compression not in COMPRESSIONS:
            raise ElaraError(f"compression={compression} must be one of: null, 4bit, 8bit")
        self.compression = compression
        self.shards = Path(shards).expanduser() if shards else None
        self._streaming: Any = None

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "compression": self.compression}

    def close(self) -> None:
        with self._lock:
            if self._streaming is not None:
                self._streaming._executor and self._streaming._executor.shutdown()
                self._streaming = None
        super().close()

    def _open(self, folder: Path, device: torch.device) -> Any:
        theirs = self._their_tokenizer(folder)
        try:
            config = pretrained("AutoConfig", folder)
        except Exception as error:  # of many kinds, all about this folder
            raise BackendError("refused", f"airllm cannot load {self.model}: {brief(error)}") from error
        if not list(folder.glob("*.safetensors")):
            raise BackendError("refused", f"{folder} holds no safetensors: airllm cannot take its layers apart")
        shards = self.shards or self.cache / "airllm" / f"{folder.name}-{_stamp(folder)}"
        shards.mkdir(parents=True, exist_ok=True)
        dtype = fastest(device) if self.dtype == "auto" else DTYPES[self.dtype]
        try:
            with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
                self._streaming = _class_for(config, theirs)(
                    str(folder),
                    device=str(device),
                    dtype=dtype,
                    layer_shards_saving_path=str(shards),
                    compression=self.compression,
                    prefetching=self.compression is None,
                )
        except ImportError as error:
            reason = brief(error).removeprefix("WARNING: ")
            raise BackendError("refused", f"airllm lacks a package: {reason}") from error
        except Exception as error:  # of many kinds, all about this model or the disk
            raise BackendError("refused", f"airllm cannot load {self.model}: {brief(error)}") from error
        report = _Report(self.model)
        for layer in self._streaming.layers:
            layer.register_forward_hook(report)
        return self._streaming.model


def _class_for(config: Any, tokenizer: Any) -> Any:
    """airllm's class for a model, with a tokenizer that was read already.

    Its own choice, AutoModel, would run code that lies in the model's folder.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import airllm
            from airllm import airllm_base, utils
            from airllm.auto_model import ARCH_OVERRIDES
    except ImportError as error:
        raise BackendError(
            "refused", "teacher=airllm needs an extra: pip install 'elara-hivemind[teachers]'"
        ) from error
    # it collects garbage behind every layer, where there is none: five times the seconds of a forward
    airllm_base.clean_memory = utils.clean_memory = lambda: None
    name = ARCH_OVERRIDES.get((config.architectures or [""])[0], "AirLLMBaseModel")
    return type(name, (getattr(airllm, name),), {"get_tokenizer": lambda self, hf_token=None: tokenizer})


def _stamp(folder: Path) -> str:
    """Tells one model from another that is put into the same folder later."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


class _Report:
    """A line on stderr once in a while: one forward may take minutes."""

    def __init__(self, name: str) -> None:
        self._name, self._read, self._next = name, 0, time.monotonic() + REPORT_EVERY

    def __call__(self, *_: object) -> None:
        self._read += 1
        if time.monotonic() >= self._next:
            print(f"{self._name}: {self._read:,} layers read", file=sys.stderr, flush=True)
            self._next = time.monotonic() + REPORT_EVERY
