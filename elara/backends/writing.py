"""The pieces that a server streams, put together into an answer: whole characters, no thoughts, not without end."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from elara.backends.base import Answer, TokenChoice
from elara.backends.retry import Failure
from elara.backends.stopping import StopText

OPEN, CLOSE = "<think>", "</think>"
CLOSED_ONLY = re.compile(r"\A.*?\n</think>\n\n", re.DOTALL)  # templates that end in <think> leave only its end to see
# How servers say that an answer is whole, and that the limit cut it off; what they say of calls, which are not words.
FINISHES = {
    "stop": "stop", "eos": "stop", "end_turn": "stop",
    "length": "length", "max_tokens": "length", "model_length": "length",
}  # fmt: skip
CALLS = ("tool_calls", "tool_call", "tool_use", "function_call")


@dataclass(frozen=True)
class Piece:
    """What one event of a stream brought. finish: `stop` or `length` where it was the last one."""

    text: str = ""
    thought: int = 0  # characters of a field for thoughts
    tokens: tuple[tuple[TokenChoice, bytes], ...] = ()
    finish: str | None = None


@dataclass
class Writing:
    """An answer while it is written."""

    max_characters: int
    stop: StopText
    _held: str = ""  # not given out yet: it may be half a character, a tag or the white space behind one
    _state: str = "start"  # start, thinking, behind (the thoughts), text
    _text: list[str] = field(default_factory=list)
    _tokens: list[tuple[TokenChoice, bytes]] = field(default_factory=list)
    _characters: int = 0
    _finish: str | None = None

    def add(self, piece: Piece) -> str:
        """The part of the answer's text that is certain now."""
        self._characters += len(piece.text) + piece.thought
        if self._characters > self.max_characters:
            why = f"went on for more than {self.max_characters} characters"
            raise Failure("endless", why, "lower max_new_tokens, or raise `max_characters`")
        self._tokens += piece.tokens
        self._finish = piece.finish or self._finish
        return self._stopped(self._visible(piece.text))

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._finish is not None or self.stop.met

    def end(self) -> str:
        """What was held back; afterwards `answer` is whole."""
        if not self.finished:
            raise Failure("failed", "broke off in the middle of an answer", "look at the server's log", again=True)
        text, self._held = ("" if self._state in ("thinking", "behind") else self._held), ""
        text = "" if self.stop.met else self._stopped(_check_whole(text))
        if not self.stop.met:
            text += self.stop.flush()
            self._text[-1] = text
        return text

    def _stopped(self, text: str) -> str:
        """Servers cut stop texts off themselves; not all do, and not all take many."""
        text = self.stop.feed(text)
        self._text.append(text)
        return text

    def empty(self) -> Failure:
        """The failure of an answer without a word."""
        if self._finish == "length":
            return Failure("empty", "wrote nothing but thoughts or white space", "raise max_new_tokens", again=True)
        return Failure("empty", "gave an empty answer", "ask in other words, or take another model", again=True)

    @property
    def answer(self) -> Answer:
        text = "".join(self._text)
        if self._state == "text":
            text = CLOSED_ONLY.sub("", text)
        return Answer(text, "stop" if self.stop.met else self._finish or "stop", self._spelling(text))

    def _visible(self, text: str) -> str:
        text, self._held = self._held + text, ""
        if self._state == "start":
            begin = text.lstrip()
            if begin != OPEN and OPEN.startswith(begin):
                self._held = text
                return ""
            self._state = "thinking" if begin.startswith(OPEN) else "text"
        if self._state == "thinking":
            _, closed, rest = text.partition(CLOSE)
            if not closed:
                self._held = text[-len(CLOSE) :]
                return ""
            self._state, text = "behind", rest
        if self._state == "behind":
            text = text.lstrip()
            self._state = "text" if text else "behind"
        if "\ud800" <= text[-1:] <= "\udbff":  # the first half of a character that JSON wrote as two
            text, self._held = text[:-1], text[-1]
        return _check_whole(text)

    def _spelling(self, text: str) -> tuple[TokenChoice, ...]:
        """The tokens that spell `text`, without those of thoughts before it; none where they spell something else."""
        written, wanted = b"".join(raw for _, raw in self._tokens), text.encode()
        start = written.rfind(wanted)
        if start < 0 or not wanted:
            return ()
        found, at = [], 0
        for token, raw in self._tokens:
            if at < start + len(wanted) and at + len(raw) > start:
                found.append(token)
            at += len(raw)
        return tuple(found)


def finish_of(reason: str | None) -> str | None:
    """What a server's finish reason means, in any case: `stop`, `length`; None, the answer goes on, where it is empty.

    Raises Failure for tool calls, and for every reason that does not say that the answer is whole or was cut off.
    """
    if not reason:
        return None
    known = reason.lower()
    if known in CALLS:
        raise called()
    if known not in FINISHES:
        raise Failure("failed", f"ended its answer with {reason[:40]!r}", "look at the server's log", again=True)
    return FINISHES[known]


def called() -> Failure:
    """The failure of an answer that calls a tool: nobody offered one here."""
    return Failure("unfit", "called a tool instead of answering in words", "see which tools the server gives its model")


def _check_whole(text: str) -> str:
    """`text` with surrogate pairs joined."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            raise Failure("not_text", "wrote half a character", "look at what answers there") from None
