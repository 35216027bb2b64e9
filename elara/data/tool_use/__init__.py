"""Verifiable tool use: questions with the right call, tools that truly compute, conversations by the thousand.

Everything depends on a seed alone. Some phrasings, and one of eight numbers, dates and names, never occur in training
conversations; held-out questions are made of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from elara.data.samples import Message, Sample
from elara.data.tool_use import arithmetic, dates, lookups, talk, units
from elara.data.tool_use.base import Question, Wanted, World, leaks
from elara.data.tool_use.draws import Draws
from elara.errors import ElaraError
from elara.tokenizer.calls import Call, parse_call

__all__ = ["FAMILIES", "TOOLS", "Call", "Question", "check_families", "conversation", "conversations", "opening",
           "parse_call", "questions", "run_tool"]  # fmt: skip

VERSION = 1  # raised when the same seed gives other conversations
NAMED = "Tools: "  # begins the system message, followed by the names of the tools with commas between

FAMILIES: dict[str, Callable[[Draws, Wanted], Question]] = {
    "arithmetic": arithmetic.make,
    "dates": dates.make,
    "units": units.make,
    "lookups": lookups.make,
    "talk": talk.make,
}
TOOLS: dict[str, Callable[[dict[str, Any], World], Any]] = {
    "calculate": arithmetic.calculate,
    "days_between": dates.days_between,
    "weekday": dates.weekday,
    "add_days": dates.add_days,
    "convert": units.convert,
    "look_up": lookups.look_up,
}


def run_tool(call: Call, world: World) -> str:
    """What the tool says, as JSON: {"result": ...} or {"error": why}."""
    try:
        if call.name not in TOOLS:
            raise ElaraError(f"there is no tool {call.name}")
        return json.dumps({"result": TOOLS[call.name](call.arguments, world)})
    except ElaraError as error:
        return json.dumps({"error": str(error)})


def opening(question: Question, draws: Draws | None = None) -> list[Message]:
    """The messages before the assistant's first.

    draws: the tools in another order, without some that the question does not need, or not named at all; None = all.
    """
    tools = list(TOOLS)
    if draws is not None:
        mixed = draws.shuffled(tools)
        kept = mixed[: draws.between(1, len(tools))]
        tools = kept if question.tool is None or question.tool in kept else [*kept, question.tool]
    user = {"role": "user", "content": question.text}
    if draws is not None and draws.chance(2):
        return [user]
    return [{"role": "system", "content": NAMED + ", ".join(tools)}, user]


def conversation(question: Question, draws: Draws | None = None) -> list[Message]:
    """Question, call, what the tool said, answer."""
    messages = opening(question, draws)
    if question.tool is None:
        return [*messages, {"role": "assistant", "content": question.answer}]
    call = Call(question.tool, question.arguments)
    said = run_tool(call, question.world)
    found = json.loads(said)
    answer = question.answer.format(found["result"]) if "result" in found else question.failing
    return [
        *messages,
        {"role": "assistant", "content": call.text()},
        {"role": "tool", "content": said},
        {"role": "assistant", "content": answer},
    ]


def conversations(count: int, seed: int, families: Sequence[str] = tuple(FAMILIES)) -> Iterator[Sample]:
    """Training samples, the families in turn; no phrasing, number, date or name in them is held out."""
    check_families(families)
    for i in range(count):
        family, attempt = families[i % len(families)], 0
        while True:
            draws = Draws("train", seed, family, i, attempt)
            question = FAMILIES[family](draws, Wanted(False, False))
            messages = conversation(question, draws)
            if not any(leaks(message["content"]) for message in messages):
                break
            attempt += 1  # a result, or a part of a date, that is held out
        yield Sample(f"tool_use/{seed}/{i}", tuple(messages), source="tool_use", provenance={"family": family})


def questions(count: int, seed: int, families: Sequence[str] = tuple(FAMILIES)) -> list[Question]:
    """Held-out questions, the families in turn: all of unseen numbers, dates and names, every other one in a phrasing
    that is not in training either."""
    check_families(families)
    return [
        FAMILIES[families[i % len(families)]](Draws("held out", seed, i), Wanted(i // len(families) % 2 == 1, True))
        for i in range(count)
    ]


def check_families(families: Sequence[str]) -> None:
    """Raise ElaraError for a family that is not there, or none at all."""
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        given = f"there is no {unknown[0]}" if unknown else "none is named"
        raise ElaraError(f"data.families: {given}; give some of {', '.join(FAMILIES)}")
