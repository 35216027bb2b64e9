"""What teachers say of a whole training split, asked once before the runs that learn from it and kept on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from elara.data import Prepared
from elara.data.batches import PADDING
from elara.data.opinions import MANIFEST, OpinionFile, OpinionWriter
from elara.data.preparation import locked
from elara.data.progress import Progress
from elara.data.tokens import TokenFile
from elara.errors import NotFinite
from elara.tokenizer import Tokenizer
from elara.training.config import DistillConfig
from elara.training.teaching import Teacher

VERSION = 2  # of how opinions are put into another tokenizer
ROWS = 8  # windows of `distill.context` that a teacher reads at once
SHORT = 64  # or so many shorter ones


class Window(NamedTuple):
    """Tokens from start to end, read together; opinions behind those before `stop` are kept, as far as new.

    speaker: id of the role that speaks at the start; -1 in texts.
    """

    start: int
    stop: int
    end: int
    speaker: int = -1


def stored_opinions(teacher: Teacher, prepared: Prepared, settings: DistillConfig) -> OpinionFile:
    """A teacher's opinions on the training split, from disk or asked for now.

    They lie in the prepared folder, under a name that holds a hash of all that changes them. A killed process goes on
    where it was; a second one waits for the first. Raises NotFinite, and throws away what was stored, when they hold
    nan, also if an earlier version of this program stored it.
    """
    other = VERSION if teacher.projection is not None and not teacher.projection.same else False
    asked = {"teacher": teacher.backend.identity(), "k": settings.top_k, "temperature": settings.temperature,
             "context": settings.context, "overlap": settings.context // 4, "projected": other}  # fmt: skip
    if prepared.train.weights is not None:
        asked["windows"] = "documents"
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    folder = prepared.folder / "teachers" / f"{teacher.name}-{key}"
    if (folder / MANIFEST).exists() and (found := OpinionFile(folder)).checked:
        return found
    folder.parent.mkdir(exist_ok=True)
    with locked(folder):
        try:
            if not (folder / MANIFEST).exists():
                _ask_all(teacher, prepared, settings, folder, asked)
            found = OpinionFile(folder)
            for said in found.parts():
                teacher.watch(said)
            teacher.check()
        except NotFinite:
            shutil.rmtree(folder)
            raise
        found.mark_checked()
    return found


def _ask_all(
    teacher: Teacher, prepared: Prepared, settings: DistillConfig, folder: Path, asked: Mapping[str, Any]
) -> None:
    train = prepared.train
    windows = list(reading_windows(train, settings.context, prepared.tokenizer))
    writer = OpinionWriter(folder, settings.top_k, prepared.tokenizer.vocab_size)
    try:
        writer.check_room(windows[-1].stop)
        with Progress(f"{teacher.name} reads the training text", "tokens", windows[-1].stop, writer.done) as progress:
            todo = [window for window in windows if window.stop > writer.done]
            for some in together(todo, ROWS * settings.context):
                said = teacher.opinion(_rows(train, some), settings)
                teacher.watch(said)
                teacher.check()
                for row, window in enumerate(some):
                    new = slice(writer.done - window.start, window.stop - window.start)
                    progress.advance(window.stop - writer.done)
                    writer.write(*(value[row, new] for value in said))
    finally:
        writer.stop()
    writer.finish(asked)


def reading_windows(train: TokenFile, context: int, tokenizer: Tokenizer) -> Iterator[Window]:
    """Windows of at most `context` tokens in which a teacher reads a split, so that it knows some text before a token.

    A text runs through, and behind its last token nothing follows. Of samples each is read alone, as it is asked.
    """
    if train.weights is None:
        total = len(train) - 1
        length = min(context - 1, total)  # and a token more is read, to know what followed
        yield from (Window(start, start + length, start + length + 1) for start in reading_starts(total, length))
        return
    roles = np.array(list(tokenizer.role_ids.values()))
    for begin, end in zip([0, *train.ends[:-1].tolist()], train.ends.tolist(), strict=True):
        total = end - begin
        for start in reading_starts(total, min(context, total)):
            known = train.tokens[begin : begin + start + 1]
            spoken = known[np.isin(known, roles)]
            speaker = int(spoken[-1]) if len(spoken) else -1
            stop = begin + start + min(context, total)
            yield Window(begin + start, stop, stop, speaker)


def reading_starts(total: int, length: int) -> list[int]:
    """Where windows of `length` tokens begin that cover `total` of them.

    Each begins a quarter of its length before the end of the one before; the last ends with the text.
    """
    stride = length - length // 4
    return [min(at, total - length) for at in range(0, max(total - length // 4, 1), stride)]


def together(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """Windows that are read at once: one after the other, of so many tokens with what pads the shorter ones."""
    some, longest = list[Window](), 0
    for window in windows:
        length = window.end - window.start
        if some and (max(longest, length) * (len(some) + 1) > tokens or len(some) == SHORT):
            yield some
            some, longest = [], 0
        some.append(window)
        longest = max(longest, length)
    if some:
        yield some


def _rows(train: TokenFile, windows: Sequence[Window]) -> torch.Tensor:
    rows = np.full((len(windows), max(window.end - window.start for window in windows)), PADDING, np.int64)
    for row, window in zip(rows, windows, strict=True):
        start, end, speaker = window.start, window.end, window.speaker
        row[: end - start] = train.tokens[start:end]
        if speaker >= 0:
            row[0] = speaker  # a token that the window before has read gives way to whose words these are
    return torch.from_numpy(rows)
