"""Messages in OpenAI's and ShareGPT's form as role and content: parts of text, tool calls as models learn them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from elara.errors import ElaraError
from elara.tokenizer.calls import Call, with_calls

LINKS = ("id", "tool_call_id")  # what ties a result to its call; here it follows the call
WORDS = (str, list, Mapping)  # kinds of values that may hold words
SHAREGPT = ("conversations", "conversation", "system")  # keys of a row of ShareGPT's that hold its messages
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool", "function": "tool"}


def plain(message: Any) -> tuple[dict[str, Any], list[str]]:
    """A message as role and content, and the keys that carry words which are not learned.

    Content may be a list of parts that are all text. `tool_calls` and the older `function_call` are written into an
    assistant's content, after its words; what a tool says stays as it is. Raises ElaraError for
    what cannot be written.
    """
    if not isinstance(message, Mapping):
        raise ElaraError(f"a message is {type(message).__name__}, not a JSON object with role and content")
    role, given = message.get("role"), message.get("content")
    calls = [_call(call) for call in _calls(message)]
    if calls and role != "assistant":
        raise ElaraError(f"a message of role {role} calls a tool: only the assistant can")
    known = ("role", "content", "tool_calls", "function_call", *LINKS)
    unread = [key for key, value in message.items() if key not in known and value and isinstance(value, WORDS)]
    if given is None and not calls and unread:
        where = ", ".join(unread)
        raise ElaraError(f"a message has no content but words under {where}: write them there, or leave it out")
    content = "" if given is None and calls else _text(given)
    return {"role": role, "content": with_calls(content, calls) if calls else content}, unread  # Sample checks both


def from_sharegpt(row: Mapping[str, Any]) -> list[Any] | None:
    """The messages of a row in ShareGPT's form, for `plain`: `conversations` of `from` and `value`; None without any.

    A `system` text beside them is the first message. What says `role` and `content` stays as it is. Raises ElaraError
    for conversations that are no list, or a call of a function that is no JSON.
    """
    given = next((row[key] for key in SHAREGPT[:2] if row.get(key) is not None), None)
    if given is None:
        return None
    if not isinstance(given, list):
        raise ElaraError(f"conversations are {type(given).__name__}, not a list of messages")
    system = row.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return [*first, *map(_from_sharegpt, given)]


def _from_sharegpt(message: Any) -> Any:
    if not isinstance(message, Mapping) or "from" not in message:
        return message
    speaker, value = str(message["from"]), message.get("value")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    if speaker == "function_call":
        try:
            return {**others, "role": "assistant", "content": None, "function_call": json.loads(str(value))}
        except (ValueError, RecursionError) as error:
            raise ElaraError(f"a message from function_call is no JSON: {str(value)[:80]}") from error
    return {**others, "role": SPEAKERS.get(speaker, speaker), "content": value}


def _text(content: Any) -> Any:
    """The parts joined; what is neither a list nor text is left to the sample's own check."""
    if not isinstance(content, list):
        return content
    texts = list[str]()
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ElaraError(f"a message has a part of type {kind}, and only text can be learned: leave it out")
    return "".join(texts)


def _calls(message: Mapping[str, Any]) -> Iterator[Any]:
    calls, older = message.get("tool_calls"), message.get("function_call")
    if calls is not None and not isinstance(calls, list):
        raise ElaraError("a message has tool_calls that are no list")
    yield from calls or ()
    if older:
        yield older


def _call(given: Any) -> Call:
    """A call as OpenAI writes it, with or without `function` around it, its arguments as an object or as JSON."""
    call = given.get("function", given) if isinstance(given, Mapping) else None
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, Mapping) else (None, None)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        wrong = "a tool call without a name, or with arguments that are no JSON object"
        raise ElaraError(f"a message has {wrong}: {json.dumps(given, ensure_ascii=False)[:80]}")
    return Call(name, dict(arguments))
