"""Tool calls as text, in the form that many models use: <tool_call>{"name": ..., "arguments": ...}</tool_call>.

This is the one place that knows it: conversations are made of it and read by it, and chat templates write it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """What a model asks a tool for."""

    name: str
    arguments: dict[str, Any]

    def text(self) -> str:
        """As the model writes it."""
        call = json.dumps({"name": self.name, "arguments": self.arguments}, ensure_ascii=False)
        return f"{OPEN}{call}{CLOSE}"


def with_calls(words: str, calls: Sequence[Call]) -> str:
    """What an assistant's message says that has words and calls: the words, then each call, a line each."""
    return "\n".join([*([words] if words or not calls else []), *(call.text() for call in calls)])


def parse_call(text: str) -> Call | None:
    """The call that a message consists of; None when it is anything else: no call, broken JSON, words beside it."""
    found = _CALL.fullmatch(text)
    if found is None:
        return None
    try:
        call = json.loads(found[1])
    except ValueError:
        return None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments")
    return Call(call["name"], dict(arguments)) if isinstance(arguments, Mapping) else None
