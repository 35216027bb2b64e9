"""From a source and a tokenizer to token files on disk: built once, atomically, rebuilt when either changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from elara import archives
from elara import tokenizer as tokenizers
from elara.data.config import CorpusConfig
from elara.data.sources import open_source
from elara.data.sources.base import SPLITS, Source
from elara.data.tokens import TokenFile, token_dtype
from elara.errors import ElaraError
from elara.tokenizer import Tokenizer, TokenizerConfig

FORMAT_VERSION = 2  # of the prepared folder; part of its key


@dataclass(frozen=True)
class Prepared:
    """A corpus ready for training.

    Attributes:
        manifest: source, hashes, tokenizer and counts, as in the folder's `manifest.json`.
    """

    folder: Path
    tokenizer: Tokenizer
    train: TokenFile
    val: TokenFile
    manifest: dict[str, Any]


def prepare(data: CorpusConfig, tokenizer: TokenizerConfig, root: Path) -> Prepared:
    """Token files of a corpus under `root`, built when they are not there yet.

    The folder's name holds a hash of everything that changes the tokens (source, its sha256, split, tokenizer), so a
    changed text or setting is prepared anew. Two processes may call this at once: one builds, the other waits.

    Args:
        root: folder for downloads and prepared data, `data/` of the project.

    Raises:
        ElaraError: text, archive or tokenizer that cannot be had or is damaged.
    """
    root = Path(root)
    source = open_source(data, root)
    recipe = {"format": FORMAT_VERSION, **source.identity(), "tokenizer": tokenizers.identity(tokenizer)}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / "prepared" / f"{data.name}-{key}"
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / "manifest.json").exists():
                _build(source, tokenizers.build(tokenizer, source.text, cache=root / "archives"), recipe, folder)
                _remove_outdated(folder, recipe)
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """Open a prepared folder; ElaraError when a file is missing or cut short."""
    train, val = (TokenFile(folder, split) for split in SPLITS)
    tokenizer = tokenizers.load(folder / "tokenizer")
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    made_with = manifest["tokenizer"]["fingerprint"]
    tokenizers.check_fingerprint(tokenizer.fingerprint, made_with, f"the tokenizer of {folder}")
    return Prepared(folder, tokenizer, train, val, manifest)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build a folder; the lock goes with its process, however that ends."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that prepares {folder}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(source: Source, tokenizer: Tokenizer, recipe: dict[str, Any], folder: Path) -> None:
    """Write everything into a temporary folder beside the target, then rename it."""
    for leftover in folder.parent.glob(f".build-{folder.name}-*"):  # of a build that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    dtype = token_dtype(tokenizer.vocab_size)
    work = folder.with_name(f".parts-{folder.name}")
    building = Path(tempfile.mkdtemp(prefix=f".build-{folder.name}-", dir=folder.parent))
    try:
        counts = source.write(building, tokenizer, dtype, work)
        for split in SPLITS:
            if counts[split]["tokens"] < 2:
                raise ElaraError(f"the {split} part of this corpus is empty: give more text or set data.val_fraction")
        tokenizer.save(building / "tokenizer")
        described = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
        manifest: dict[str, Any] = {**recipe, "tokenizer": described, "dtype": dtype.str}
        manifest["weights"] = (building / "train.weights").exists()
        for split in SPLITS:
            hashes = [archives.sha256_of(file) for file in sorted(building.glob(f"{split}.*"))]  # bin, ends, weights
            content = hashlib.sha256("".join(hashes).encode()).hexdigest()
            manifest[split] = {**counts[split], "sha256": hashes[0], "content": content}
        (building / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.chmod(building, 0o755)
        os.rename(building, folder)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_outdated(folder: Path, recipe: dict[str, Any]) -> None:
    """Delete what was prepared from an earlier state of the same file with the same tokenizer kind."""
    if "path" not in recipe:
        return
    for other in folder.parent.glob("*/manifest.json"):
        try:
            manifest = json.loads(other.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # damaged, or another process was faster
            continue
        same = manifest.get("path") == recipe["path"] and manifest["tokenizer"]["kind"] == recipe["tokenizer"]["kind"]
        if same and manifest["sha256"] != recipe["sha256"]:
            shutil.rmtree(other.parent, ignore_errors=True)
