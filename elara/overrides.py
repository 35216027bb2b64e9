"""Hydra overrides as text: what each is about, what it says, and values that are read back unchanged."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_PLAIN = re.compile(r"[A-Za-z0-9_./-]*")  # values that need no second look


def is_override(argument: str) -> bool:
    """Whether a command line argument is a Hydra override rather than an option such as --cfg."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def key_of(override: str) -> str:
    """What an override is about: `trainer.max_steps` of `+trainer.max_steps=3`."""
    return override.lstrip("+~").partition("=")[0]


def value_of(override: str) -> str:
    """Its value as Hydra reads it, quotes undone, or as it stands where Hydra cannot; "" for null."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:  # a path with signs that the grammar wants quoted: what is meant is clear here
        return override.partition("=")[2]
    return "" if value is None else str(value)


def quoted(value: str) -> str:
    """A value that Hydra's grammar reads back unchanged."""
    # there, a backslash has a meaning only in front of a quote
    escaped = re.sub(r"(\\+)\Z", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", value))
    return f"'{escaped}'"


def readable(arguments: list[str]) -> list[str]:
    """Overrides whose values name a file or folder that is there, quoted where Hydra's grammar cannot read them."""
    several = bool({"-m", "--multirun"} & set(arguments))
    return [_readable(text, several) if is_override(text) else text for text in arguments]


def _readable(override: str, several: bool) -> str:
    key, _, value = override.partition("=")
    if _PLAIN.fullmatch(value) or not os.path.exists(value):
        return override
    try:
        read = OverridesParser.create().parse_override(override)
    except HydraException:
        return f"{key}={quoted(value)}"
    return f"{key}={quoted(value)}" if read.is_sweep_override() and not several else override


def without(overrides: Iterable[str], *groups: str) -> list[str]:
    """The overrides that are not about one of `groups` nor about a key inside them."""
    return [text for text in overrides if not any(f"{key_of(text)}.".startswith(f"{group}.") for group in groups)]
