"""The store: every answer once, as a line behind all earlier ones, there from the moment it was given back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from elara.backends import Answer, Params
from elara.collect.prompts import Prompt
from elara.data.hashes import digest
from elara.data.samples import Sample
from elara.errors import ElaraError
from elara.runs import write_whole

ANSWERS = "answers.jsonl"
LOCK = ".lock"
BLOCK = 1 << 16  # bytes that are searched for a line end at once


def answer_id(prompt: Prompt, teacher: str, params: Params) -> str:
    """The key of an answer. teacher: hash of the teacher's identity."""
    return digest([prompt.id, teacher, asdict(params)])


def answer_sample(
    prompt: Prompt, answer: Answer, name: str, identity: Mapping[str, Any], params: Params, weight: float
) -> Sample:
    """An answer with everything that is known about it. name, identity: of the teacher."""
    teacher = digest(identity)
    provenance: dict[str, Any] = {
        "teacher": name,
        "teacher_hash": teacher,
        "identity": dict(identity),
        "prompt": prompt.id,
        "params": asdict(params) | {"stop": list(params.stop)},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "finish": answer.finish,
        "sha256": hashlib.sha256(answer.text.encode()).hexdigest(),
    }
    if params.logprobs:
        provenance["logprobs"] = [
            [token.text, _nats(token.logprob), [[text, _nats(value)] for text, value in token.top]]
            for token in answer.tokens
        ]
    messages = (*prompt.messages, {"role": "assistant", "content": answer.text})
    return Sample(answer_id(prompt, teacher, params), messages, source="teacher", weight=weight, provenance=provenance)


def _nats(value: float) -> float | None:
    """Five decimals, a hundredth of what float16 would lose; JSON has no infinity."""
    return round(value, 5) if math.isfinite(value) else None


class Store:
    """A folder with answers.jsonl, held by one process at a time; safe to append to from several threads.

    A line is handed to the system whole before `append` returns, so that killing the process loses nothing; `sync`
    makes it survive a power cut as well. A last line that a kill cut short is removed when the store is opened.

    Raises:
        ElaraError: another process holds the store, or a line of it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / ANSWERS
        folder.mkdir(parents=True, exist_ok=True)
        self._held = FileLock(folder / LOCK)
        try:
            self._held.acquire(timeout=0)
        except Timeout:
            raise ElaraError(f"another process collects in {folder}: wait for it, or give another name=") from None
        try:
            self.file.touch()
            self.cut = _cut_torn_line(self.file)
            self._size = self.file.stat().st_size
            self._ids = {sample.id for _, sample in self.samples()}
            self._stream = self.file.open("ab", buffering=0)
        except BaseException:
            self._held.release()
            raise
        self._lock = threading.Lock()
        self._open, self._dirty = True, False

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def append(self, sample: Sample) -> bool:
        """Add an answer; returns False, and writes nothing, when it is there already or the store is closed."""
        line = (json.dumps(sample.row(), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            if not self._open or sample.id in self._ids:
                return False
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[self._stream.write(rest) :]
            except OSError as error:  # a full disk: what is there stays readable
                with contextlib.suppress(OSError):
                    self._stream.truncate(self._size)
                raise OSError(error.errno, error.strerror, str(self.file)) from error
            self._size += len(line)
            self._ids.add(sample.id)
            self._dirty = True
            return True

    def discard(self, teacher: str) -> int:
        """Take out all answers of a teacher, by the hash of its identity; returns how many there were."""
        with self._lock:
            if not self._open:
                return 0
            lines = self.file.read_bytes().splitlines(keepends=True)
            samples = [_parse(line, f"{self.file}, line {i}") for i, line in enumerate(lines, 1)]
            kept = [i for i, sample in enumerate(samples) if sample.provenance.get("teacher_hash") != teacher]
            if gone := len(lines) - len(kept):
                write_whole(self.file, b"".join(lines[i] for i in kept))
                self._stream.close()
                self._stream = self.file.open("ab", buffering=0)
                self._size, self._ids = self.file.stat().st_size, {samples[i].id for i in kept}
                self._dirty = True
            return gone

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with self._lock:
            if not (self._open and self._dirty):
                return
            self._dirty = False
            descriptor = os.dup(self._stream.fileno())  # the wait is not held against the threads that append
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def samples(self) -> Iterator[tuple[int, Sample]]:
        """Every answer and the byte where its line begins, in the order in which they came."""
        offset = 0
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                yield offset, _parse(line, f"{self.file}, line {number}")
                offset += len(line)

    def at(self, offset: int) -> Sample:
        """The answer whose line begins at a byte that `samples` gave."""
        with self.file.open("rb") as lines:
            lines.seek(offset)
            return _parse(lines.readline(), f"{self.file}, byte {offset}")

    def close(self) -> None:
        """Sync and let go; threads that come later write nothing."""
        self.sync()
        with self._lock:
            if self._open:
                self._open = False
                self._stream.close()
                self._held.release()


def _parse(line: bytes, where: str) -> Sample:
    try:
        return Sample.of(json.loads(line), where)
    except ValueError as error:
        raise ElaraError(f"{where} is damaged ({error}): delete that line") from error


def _cut_torn_line(file: Path) -> int:
    """Remove what stands behind the last line end; returns how many bytes that was."""
    with file.open("rb+") as stream:
        size = end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - BLOCK)
            stream.seek(start)
            if (found := stream.read(end - start).rfind(b"\n")) >= 0:
                end = start + found + 1
                break
            end = start
        stream.truncate(end)
    return size - end
