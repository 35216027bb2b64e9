"""What a teacher with another tokenizer says, in the student's tokens: distillation across tokenizers.

Both read the same text. Where a token of each ends at the same character, both say what comes next: each of the
teacher's likeliest tokens is spelled in the student's, and gives its probability to the first of these. Where the
student is some tokens further, inside a token of the teacher, those of the teacher's tokens count whose spelling begins
with them, in proportion. So a byte or character learns from the sum over all tokens that begin with it (as in Phan et
al., arXiv 2410.09303), and a word from all its spellings. Elsewhere the teacher has no opinion.

A conversation it reads in its own chat template: the messages' words stand where they stood, and what the template
writes between them takes the place of the student's roles. The token that ends an answer there is the student's end.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from elara.backends import Backend, BackendError
from elara.data.opinions import StoredOpinion
from elara.errors import ElaraError
from elara.launch import global_rank
from elara.tokenizer import Tokenizer

MORE = 4  # teacher's tokens that are asked for per student's token that is kept: several begin alike
BETWEEN = 0.5  # where a teacher's token ends that ends at no token of the student's: so far from the next place
LEAST = 1e-3  # of the teacher's probability that must lie on tokens that begin as the text does

NOTHING = float("-inf")
NOWHERE = float("inf")  # behind all of the student's tokens


@dataclass
class Reading:
    """A row of the student's as the teacher reads it.

    ends: where its tokens end, in characters, .5 for inside of one; an end of document counts as one.
    """

    ids: list[int]
    ends: list[float]


class Unit(NamedTuple):
    """A message of a role, or a document (None): its text, and whether an end stands behind it."""

    role: str | None
    tokens: list[int]
    closed: bool = False


class Projection:
    """Opinions of `backend` for a student with `student`'s tokenizer, or with the same one but roles of its own.

    Attributes:
        same: both have the same tokenizer, and only conversations are read otherwise.
    """

    def __init__(self, backend: Backend, teacher: Tokenizer, student: Tokenizer) -> None:
        self.backend, self.teacher, self.student = backend, teacher, student
        self.same = teacher.fingerprint == student.fingerprint
        self._spellings: dict[int, tuple[int, ...]] = {teacher.end_id: (student.end_id,)}
        self._roles = {token: role for role, token in student.role_ids.items()}
        self._frames: dict[tuple[str, ...], list[list[int]] | None] = {}
        self._closes = self._find_end()
        self._anchor = teacher.encode("a")
        self._known = len(teacher.decode(self._anchor))

    def opinion(self, rows: torch.Tensor, k: int, temperature: float) -> StoredOpinion:
        """rows: int64 (batch, seq) of the student's ids, -1 behind an end. k: tokens kept behind each; -1 = fewer."""
        words = [[token for token in row if token >= 0] for row in rows.tolist()]
        readings = [self._read(row) for row in words]
        longest = max(len(reading.ids) for reading in readings)
        padded = [reading.ids + [0] * (longest - len(reading.ids)) for reading in readings]  # behind all that counts
        said = self.backend.top_logprobs(torch.tensor(padded), k if self.same else MORE * k, temperature)
        ids = np.full((*rows.shape, k), -1, np.int64)
        logprobs = np.full((*rows.shape, k + 1), NOTHING, np.float32)
        logprobs[..., k] = 0.0  # no opinion: all that there is lies in the rest
        following = np.full(rows.shape, np.nan, np.float32)
        tops, masses = said.ids.cpu().numpy(), said.logprobs.exp().cpu().numpy()
        for i, (row, reading) in enumerate(zip(words, readings, strict=True)):
            self._project(row, reading, tops[i], masses[i], ids[i], logprobs[i], following[i])
        return StoredOpinion(*(torch.from_numpy(value).to(rows.device) for value in (ids, logprobs, following)))

    def _project(
        self, row: Sequence[int], reading: Reading, tops: NDArray[Any], masses: NDArray[Any],
        ids: NDArray[Any], logprobs: NDArray[Any], following: NDArray[Any],
    ) -> None:
        """Fill one row: ids (seq, k), logprobs (seq, k + 1), following (seq)."""
        k, last = ids.shape[1], -1  # the teacher's token that ended last
        begun: list[int] | None = []  # the student's tokens since then; None: it is not known which
        for place, end in enumerate(self._ends(row)):
            if begun is not None:
                begun.append(row[place])
            while end is not None and last + 1 < len(reading.ends) and reading.ends[last + 1] <= end:
                last += 1
                begun = [] if reading.ends[last] == end else None
            if begun is None or last < 0:
                continue
            mass = self._next(tops[last], masses[last], tuple(begun))
            if mass is None:
                continue
            best = sorted(mass.items(), key=lambda pair: -pair[1])[:k]
            rest = max(1.0 - sum(value for _, value in best), 0.0)
            ids[place, : len(best)] = [token for token, _ in best]
            logprobs[place, : len(best)] = np.log([value for _, value in best])
            logprobs[place, k] = np.log(rest) if rest > 0 else NOTHING
            if place + 1 < len(row):
                following[place] = np.log(dict(best).get(row[place + 1], rest) or 1e-12)

    def _next(self, tops: NDArray[Any], masses: NDArray[Any], begun: tuple[int, ...]) -> dict[int, float] | None:
        """Probabilities of the student's next tokens behind `begun`, inside a teacher's token; None: no opinion."""
        length, total, mass = len(begun), 0.0, dict[int, float]()
        for token, value in zip(tops.tolist(), masses.tolist(), strict=True):
            spelling = self._spell(token)
            if length and spelling[:length] != begun:
                continue
            total += value
            if len(spelling) > length:
                mass[spelling[length]] = mass.get(spelling[length], 0.0) + value
        if not mass or (length and total < LEAST):
            return None
        scale = 1.0 / total if length else 1.0
        return {token: value * scale for token, value in mass.items()}

    def _spell(self, token: int) -> tuple[int, ...]:
        """A teacher's token in the student's tokens; () for what has no text of its own, or characters it lacks."""
        if self.same and token < self.teacher.plain_size:
            return self._spellings.get(token, (token,))
        if token not in self._spellings and token in self.teacher.markers:
            self._spellings[token] = ()
        if token not in self._spellings:
            text = self.teacher.decode([*self._anchor, token])[self._known :]
            try:
                spelled = () if "\ufffd" in text else tuple(self.student.encode(text))
            except ElaraError:
                spelled = ()
            self._spellings[token] = spelled
        return self._spellings[token]

    def _read(self, row: Sequence[int]) -> Reading:
        """The row's text in the teacher's tokens; nothing of conversations that it cannot read."""
        units = list(self._units(row))
        before = self._before([unit.role for unit in units])
        if before is None:
            return Reading([0], [NOWHERE])
        reading, place = Reading([], []), 0
        for unit, ids in zip(units, before, strict=True):
            place += unit.role is not None
            reading.ids += ids
            reading.ends += [place - BETWEEN] * len(ids)
            if unit.role is not None and ids:
                reading.ends[-1] = place
            place = self._read_text(unit.tokens, reading, place)
            if unit.role == "assistant" and not self._closes and unit.tokens:
                reading.ends[-1] += BETWEEN  # whether the answer ends here, it does not say in a token
            if unit.closed:
                place += 1
                if unit.role is None:
                    reading.ids.append(self.teacher.end_id)
                    reading.ends.append(place)
        return reading

    def _read_text(self, tokens: Sequence[int], reading: Reading, place: int) -> int:
        """Append plain text that begins at `place`; where it ends."""
        words = self.student.decode(tokens)
        ids, stream, end = self.teacher.encode(words), self.teacher.stream_decoder(), place
        pieces = [stream.feed(token) for token in ids]
        faithful = "".join(pieces) + stream.flush() == words  # no prefix, no normalisation moved the places
        for token, piece in zip(ids, pieces, strict=True):
            end += len(piece)
            reading.ids.append(token)
            reading.ends.append(end if piece and faithful else end + BETWEEN)
        return place + len(words)

    def _units(self, row: Sequence[int]) -> Iterator[Unit]:
        """Messages and documents of a row. A row that begins inside of a message begins with a document."""
        unit: Unit | None = None
        for token in row:
            if token in self._roles:
                if unit is not None:
                    yield unit
                unit = Unit(self._roles[token], [])
            elif token == self.student.end_id:
                yield (unit or Unit(None, []))._replace(closed=True)
                unit = None
            else:
                unit = unit or Unit(None, [])
                unit.tokens.append(token)
        if unit is not None:
            yield unit

    def _before(self, roles: Sequence[str | None]) -> list[list[int]] | None:
        """What the teacher reads before each message or document (None); None: it refuses such a conversation.

        A system message begins a conversation of its own, and so does what follows a document.
        """
        found, closing, at = list[list[int]](), list[int](), 0
        while at < len(roles):
            after = itertools.takewhile(lambda role: role not in (None, "system"), roles[at + 1 :])
            talk = tuple(role for role in (roles[at], *after) if role is not None)
            if roles[at] is None:
                found.append(closing)
                closing, at = [], at + 1
            elif (frame := self._frame(talk)) is None:
                return None
            else:
                found += [closing + frame[0], *frame[1:-1]]
                closing, at = frame[-1], at + len(talk)
        return found

    def _frame(self, roles: tuple[str, ...]) -> list[list[int]] | None:
        if roles not in self._frames:
            try:
                self._frames[roles] = self._ask_frame(roles)
            except BackendError as error:
                if error.kind != "unfit":
                    raise
                if None not in self._frames.values() and global_rank() == 0:
                    print(f"note: some conversations stay without a teacher: {error}", file=sys.stderr, flush=True)
                self._frames[roles] = None
        return self._frames[roles]

    def _ask_frame(self, roles: tuple[str, ...]) -> list[list[int]]:
        try:
            return self.backend.frame(roles)
        except BackendError as error:
            if error.kind != "unfit" or roles[0] != "assistant":
                raise
        first, second, *others = self.backend.frame(("user", *roles))  # many templates let nobody else begin
        return [first + second, *others]

    def _find_end(self) -> bool:
        """Learn what ends an answer; False: no token of its own does, or it has no chat template."""
        try:
            closing = self.backend.frame(("user", "assistant"))[-1]
        except BackendError:
            return False
        ends = closing[:1]
        if not ends or ends[0] not in self.teacher.markers | {self.teacher.end_id}:
            return False
        self._spellings[ends[0]] = (self.student.end_id,)
        return True

    def _ends(self, row: Sequence[int]) -> list[int | None]:
        """Where each of the student's tokens ends, in characters; None inside of one. An end of document and a role
        count as one."""
        ends, place, stream = list[int | None](), 0, self.student.stream_decoder()
        for token in row:
            if token == self.student.end_id or token in self._roles:
                place += len(stream.flush()) + 1
                stream = self.student.stream_decoder()
                ends.append(place)
                continue
            piece = stream.feed(token)
            place += len(piece)
            ends.append(place if piece else None)
        return ends
