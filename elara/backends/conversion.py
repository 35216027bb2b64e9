"""A GGUF file as a folder that transformers loads in a second: converted once, which takes a while, and kept."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from elara.backends.base import BackendError
from elara.backends.places import brief, library, pretrained

TOKENIZER_FILE = "tokenizer.json"


def converted(target: Path, get: Callable[[Path], Path], tokenizer: bytes | None = None) -> Path:
    """`target`, made when it is not there yet; it appears whole or not at all.

    get: puts the GGUF file into the folder it is given, or points at it elsewhere. tokenizer: the tokenizer.json to
    save in place of what transformers makes of the file's tables.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():  # another process was faster
            return target
        for left in target.parent.glob(f".{target.name}-{'[0-9a-f]' * 8}"):  # of a conversion that was killed
            shutil.rmtree(left, ignore_errors=True)
        folder = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
        try:
            (folder / "gguf").mkdir(parents=True)
            file = get(folder / "gguf")
            print(f"converting {file.name}, once: about half a minute for 100 MB", file=sys.stderr, flush=True)
            _convert(file, folder)
            if tokenizer is not None:
                (folder / TOKENIZER_FILE).write_bytes(tokenizer)
            shutil.rmtree(folder / "gguf")
            os.rename(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _convert(file: Path, folder: Path) -> None:
    library()  # which says it where it is not there
    if not file.is_file():
        raise BackendError("refused", f"there is no file {file}: check backend.gguf_file")
    named = {"gguf_file": file.name}
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
            model = pretrained("AutoModelForCausalLM", file.parent, dtype=torch.bfloat16, **named)
        tokenizer = pretrained("AutoTokenizer", file.parent, **named)
    except Exception as error:  # of many kinds, all about this file
        raise BackendError("refused", f"transformers cannot read {file.name}: {brief(error)}") from error
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # else the plain weights would be taken for packed ones
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
