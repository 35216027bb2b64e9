"""Addresses that hold credentials: whatever is written down or shown holds them without.

Overrides and configurations are kept in run folders, and command lines are seen by all users of a machine. So user,
password and query leave the overrides before anything reads them, and wait in the environment, which the processes of a
run inherit. A run that goes on elsewhere has them no more: they are given again with the same key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

KEYS = ("url", "base_url", "host")  # of the configuration that hold addresses
WAITING = "ELARA_ADDRESSES"  # JSON in the environment: address without credentials -> with them
_PLAIN = r"""[^\s'",}\]]+"""
_VALUE = re.compile(
    rf"""(\b(?:{"|".join(KEYS)})\s*[=:]\s*)(?:(['"]+)((?:\\.|(?!\2).)+)|({_PLAIN}(?:,\w+://{_PLAIN})*))""", re.DOTALL
)


def bare(address: str) -> str:
    """An address without user, password, query and fragment; a path stays as it is."""
    scheme, mark, rest = address.partition("://")
    if not mark:
        return re.sub(r"\A[^\s/@]+:[^\s/@]+@", "", address)
    place, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def hide(arguments: list[str]) -> list[str]:
    """Overrides whose addresses are bare; what they had waits in the environment for `whole`."""
    waiting: dict[str, str] = json.loads(os.environ.get(WAITING, "{}"))

    def taken(address: str) -> str:
        if (shown := bare(address)) != address:
            waiting[shown] = address
        return shown

    hidden = [text if text.startswith("-") else _replace(text, taken) for text in arguments]
    if waiting:
        os.environ[WAITING] = json.dumps(waiting)
    return hidden


def whole(address: str) -> str:
    """An address with what `hide` took from it."""
    return str(json.loads(os.environ.get(WAITING, "{}")).get(address, address))


def bare_values(settings: Any, key: str = "") -> Any:
    """Nested settings with bare addresses."""
    if isinstance(settings, Mapping):
        return {name: bare_values(value, str(name)) for name, value in settings.items()}
    if isinstance(settings, list):
        return [bare_values(value, key) for value in settings]
    return bare(settings) if key in KEYS and isinstance(settings, str) else settings


def bare_files(folder: Path) -> None:
    """Make the addresses bare in Hydra's record of a configuration, where they came from a file of the user's."""
    for file in folder.glob("*.yaml"):
        text = file.read_text("utf-8")
        if (shown := _replace(text, bare)) != text:
            file.write_text(shown, "utf-8")


def _replace(text: str, change: Callable[[str], str]) -> str:
    def changed(found: re.Match[str]) -> str:
        if found[2]:
            return f"{found[1]}{found[2]}{change(found[3])}"
        return found[1] + ",".join(map(change, found[4].split(",")))

    return _VALUE.sub(changed, text)
