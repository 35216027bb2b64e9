"""Hashes of values, and of source files; those of large files are remembered while size and time of change stay."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from elara.archives import sha256_of

LARGE = 1 << 26  # bytes; below, hashing takes less than a tenth of a second


def digest(value: object) -> str:
    """A short hash of JSON values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def fraction(key: str, purpose: str = "") -> float:
    """A number from 0 to below 1 by hash, independent for every purpose."""
    hashed = hashlib.blake2b(key.encode(), digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(hashed, "little") >> 11) / 2**53


def file_hash(file: Path, root: Path) -> str:
    """Hex sha256 of a file; `root/hashes` remembers those of large files."""
    status = file.stat()
    if status.st_size < LARGE:
        return sha256_of(file)
    stamp = [str(file), status.st_size, status.st_mtime_ns]
    memory = root / "hashes" / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]
    if memory.exists() and len(known := memory.read_text(encoding="ascii")) == 64:
        return known
    value = sha256_of(file)
    memory.parent.mkdir(parents=True, exist_ok=True)
    draft = memory.with_name(f"{memory.name}.{os.getpid()}")
    draft.write_text(value, encoding="ascii")
    os.replace(draft, memory)
    return value
