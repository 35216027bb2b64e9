"""Hydra overrides as text: written so that Hydra, and the shell, read back what was meant."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elara.overrides import key_of, quoted

PLAIN = re.compile(r"[./]*[A-Za-z_][\w./-]*", re.ASCII)  # what Hydra's grammar reads as a string without quotes
WORDS_WITH_MEANING = ("null", "true", "false", "nan", "inf")


def value_text(value: Any) -> str:
    """A value in Hydra's grammar: `0.01`, `null`, `true`, `deepseek`, `[0.9,0.95]`, `'two words'`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{value_text(part)}" for key, part in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(value_text, value)) + "]"
    text = str(value)
    plain = PLAIN.fullmatch(text) and text.lower() not in WORDS_WITH_MEANING
    return text if plain else quoted(text)


def merged(*lists: Iterable[str]) -> list[str]:
    """All overrides in order; of two about the same key the later one stands, in the place of the first."""
    by_key: dict[str, str] = {}
    for overrides in lists:
        by_key.update({key_of(override): override for override in overrides})
    return list(by_key.values())


def train_command(overrides: Iterable[str], python: str = "python") -> str:
    """The shell command that trains with `overrides`, ready to paste. python: as it is typed in the shell."""
    return f"{python} {shlex.join(['-m', 'elara.train', *overrides])}"
