"""Tool calls of a chat model: held-out questions, its call, what the tool truly says to it, its answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from elara.checkpoint import Loaded
from elara.data.samples import Message
from elara.data.tool_use import Call, Question, conversation, opening, parse_call, questions, run_tool
from elara.decoding import SamplingConfig, generate, writable
from elara.errors import ElaraError

SEED = 6  # of the questions: always the same, and others than those that the recipe of chat_quick was chosen by
ROWS = 32  # questions written at once
NEW_TOKENS = 192  # that a call or an answer may have; the longest right one has 120 bytes
KEPT = 20  # mistakes kept for the reader
MEASURES = ("format", "tool", "arguments", "answer")


@dataclass
class Share:
    """right of `of`, with the 95 % interval of Wilson (1927)."""

    right: int
    of: int
    share: float
    low: float
    high: float


@dataclass
class CallRates:
    """Shares of one family of questions (or all), in phrasings that training has, that it never saw, or all.

    format: one call in valid JSON and nothing else, ended; of talk: words without a call. tool, arguments: the right
    ones, the latter with the former. answer: the last sentence has what the tool says to the right call, or is the one
    for its error; of talk: the right words.
    """

    family: str
    phrasing: str
    format: Share
    tool: Share
    arguments: Share
    answer: Share


@dataclass
class Mistake:
    """A question whose call or answer was wrong: what was right, what was written."""

    question: str
    right: str
    call: str
    answer: str


@dataclass
class ToolCalls:
    """Tool calls of one checkpoint. mistakes: the first few."""

    rates: list[CallRates]
    mistakes: list[Mistake] = field(default_factory=list)


def check_chat(name: str, loaded: Loaded) -> None:
    """Raise ElaraError for a checkpoint that was not trained on conversations."""
    if not loaded.meta.get("chat"):
        advice = "train one with data=tool_use or data=chat, or leave eval.tool_calls out"
        raise ElaraError(f"eval.tool_calls: {name} was not trained on conversations; {advice}")


def measure_calls(
    loaded: Loaded, count: int, *, depth: int | None = None, advance: Callable[[int], None] = lambda _: None
) -> ToolCalls:
    """Put `count` held-out questions to a checkpoint, greedily. advance is called with how many are done."""
    asked = questions(count, SEED)
    found: list[tuple[Question, dict[str, bool]]] = []
    mistakes: list[Mistake] = []
    for start in range(0, count, ROWS):
        batch = asked[start : start + ROWS]
        for question, scores, mistake in _ask(loaded, batch, depth):
            found.append((question, scores))
            if not all(scores.values()) and len(mistakes) < KEPT:
                mistakes.append(mistake)
        advance(len(batch))
    return ToolCalls(_rates(found), mistakes)


def _ask(
    loaded: Loaded, asked: Sequence[Question], depth: int | None
) -> list[tuple[Question, dict[str, bool], Mistake]]:
    openings = [opening(question) for question in asked]
    replies = _replies(loaded, openings, depth)
    calls = [parse_call(reply or "") for reply in replies]
    going_on = [i for i, call in enumerate(calls) if call is not None and asked[i].tool is not None]
    answers = [reply if question.tool is None else None for question, reply in zip(asked, replies, strict=True)]
    more: list[list[Message]] = []
    for i in going_on:
        call, reply = calls[i], replies[i]
        assert call is not None and reply is not None
        said = {"role": "tool", "content": run_tool(call, asked[i].world)}
        more.append([*openings[i], {"role": "assistant", "content": reply}, said])
    for i, answer in zip(going_on, _replies(loaded, more, depth), strict=True):
        answers[i] = answer
    results = []
    for question, reply, answer in zip(asked, replies, answers, strict=True):
        right = conversation(question)[2]["content"]
        mistake = Mistake(question.text, right, reply or "(no end)", answer or "")
        results.append((question, judge(question, reply, answer), mistake))
    return results


def judge(question: Question, reply: str | None, answer: str | None = None) -> dict[str, bool]:
    """Which of `MEASURES` a first message, and the one behind what the tool said, satisfy; None = it came to no end."""
    call = parse_call(reply or "")
    if question.tool is None:
        spoken = bool(reply) and "<tool_call>" not in (reply or "")
        right = spoken and (reply or "").strip() == question.answer
        return {"format": spoken, "tool": spoken, "arguments": spoken, "answer": right}
    tool = call is not None and call.name == question.tool
    arguments = tool and call is not None and _same(call, question)
    told = json.loads(run_tool(Call(question.tool, question.arguments), question.world))
    if "result" in told:
        said = re.search(rf"(?<![\w.-]){re.escape(str(told['result']))}(?![\w-]|\.\d)", answer or "") is not None
    else:
        said = answer == question.failing
    return {"format": call is not None, "tool": tool, "arguments": arguments, "answer": said}


def _same(call: Call, question: Question) -> bool:
    """Whether the arguments are the right ones; blanks in an expression do not matter."""
    given, right = dict(call.arguments), dict(question.arguments)
    for both in (given, right):
        if isinstance(both.get("expression"), str):
            both["expression"] = both["expression"].replace(" ", "")
    return given == right


def _replies(loaded: Loaded, chats: Sequence[Sequence[Message]], depth: int | None) -> list[str | None]:
    """What the assistant writes next in every conversation, greedily; None = it came to no end."""
    if not chats:
        return []
    tokenizer, context = loaded.tokenizer, loaded.config.model.context_length
    prompts = [tokenizer.apply_chat(chat, generate=True, exact=True)[0][-context:] for chat in chats]
    sampling = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS, stop=[tokenizer.end_id])
    written: list[list[int]] = [[] for _ in chats]
    for step in generate(
        loaded.model, prompts, sampling, allowed=writable(tokenizer, loaded.config.vocab_size),
        mask_id=tokenizer.mask_id, depth=depth,
    ):  # fmt: skip
        for own, new in zip(written, step.tokens, strict=True):
            own += new
    return [tokenizer.decode(own[:-1]) if own and own[-1] == tokenizer.end_id else None for own in written]


def _rates(found: Sequence[tuple[Question, dict[str, bool]]]) -> list[CallRates]:
    """All that need a tool, then every family; each over all phrasings, then the seen and the held-out ones."""
    families = list(dict.fromkeys(question.family for question, _ in found))
    groups: list[tuple[str, Callable[[Question], bool]]] = [("all tools", lambda question: question.tool is not None)]
    groups += [(family, lambda question, family=family: question.family == family) for family in families]  # type: ignore[misc]
    phrasings: list[tuple[str, Callable[[Question], bool]]] = [
        ("all", lambda question: True),
        ("seen", lambda question: not question.held_out),
        ("held out", lambda question: question.held_out),
    ]
    rates = []
    for family, belongs in groups:
        for phrasing, is_such in phrasings:
            own = [scores for question, scores in found if belongs(question) and is_such(question)]
            if own:
                rates.append(CallRates(family, phrasing, *(wilson([one[key] for one in own]) for key in MEASURES)))
    return rates


def wilson(outcomes: Sequence[bool]) -> Share:
    """The share of what was right."""
    n, right, z = len(outcomes), sum(outcomes), 1.959964
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (0.0 if not right else middle - half), (1.0 if right == n else middle + half)  # these two exactly
    return Share(right, n, share, low, high)
