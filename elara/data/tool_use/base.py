"""What the families of questions share: the question, what is held out, how templates become text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from elara.data.tool_use.draws import Draws

World = Mapping[str, Mapping[str, Any]]  # table -> key -> record, what look-ups look into
HELD_OUT = 8  # one of so many numbers, dates and names never occurs in training
WORD = re.compile(r"[^\W_]+(?:[-.:][^\W_]+)*")  # 48, 2024-03-15, 3.5, Tolven


@dataclass(frozen=True)
class Question:
    """A question and the way to its answer.

    family: arithmetic, dates, ... template: which phrasing. held_out: whether that phrasing never occurs in training.
    tool, arguments: the right call; None = to be answered without one. values: the words of the question that are
    to be copied into the call. answer: the last sentence, in which `{}` stands for what the tool said; failing: that
    sentence where the tool has an error to say.
    """

    family: str
    template: str
    held_out: bool
    text: str
    answer: str
    tool: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    world: World = field(default_factory=dict)
    failing: str = ""


class Templates(NamedTuple):
    """Phrasings that training may use, and those that it never sees."""

    seen: Sequence[str]
    held_out: Sequence[str]

    def draw(self, draws: Draws, held_out: bool) -> str:
        return draws.choice(self.held_out if held_out else self.seen)


class Wanted(NamedTuple):
    """Which question to make: with phrasings and values that training has, or that it never sees."""

    held_out_template: bool
    held_out_values: bool

    def value(self, draw: Callable[[], str]) -> str:
        """The first value drawn that training may, or may not, see."""
        while True:
            value = draw()
            if all(is_held_out(word) == self.held_out_values for word in value.split()):
                return value


def is_held_out(word: str) -> bool:
    """Whether a number, a date or a name never occurs in training; single digits all do."""
    return len(word) > 1 and hashlib.blake2b(word.encode(), digest_size=1).digest()[0] % HELD_OUT == 0


def leaks(text: str) -> bool:
    """Whether a text has a number or date that training must not see."""
    return any(is_held_out(word) for word in WORD.findall(text) if any(map(str.isdigit, word)))


def spoken(draws: Draws, text: str, kept: str = "") -> str:
    """Small differences of writing: capitals, question marks and full stops that people leave out; `kept` stays."""
    if not (kept and text.startswith(kept)):
        text = (text[0].lower() if draws.chance(6) else text[0].upper()) + text[1:]
    if draws.chance(6):
        text = text.rstrip("?.")
    return text


def number(value: float) -> int | float:
    """A result as people write it: whole where it is whole, else with at most four decimals."""
    rounded = round(value, 4)
    return int(rounded) if rounded == int(rounded) else rounded
