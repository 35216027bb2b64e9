"""The parts of asking a server: back-off, threads, pieces put together."""

from __future__ import annotations

import random
import threading
import time
from email.utils import formatdate
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from elara.backends.base import Answer, BackendError, TokenChoice
from elara.backends.retry import Attempt, Caller, Failure, Limits, concurrently
from elara.backends.stopping import StopText
from elara.backends.watch import retry_after
from elara.backends.writing import Piece, Writing

HELLO = [{"role": "user", "content": "hello"}]


def caller(**limits: float) -> Caller:
    def translate(error: Exception, attempt: Attempt) -> Failure:
        raise error

    return Caller(lambda: "the bee", Limits(**limits), translate)  # type: ignore[arg-type]


class Recorded(random.Random):
    """What is drawn, and from where."""

    def __init__(self) -> None:
        super().__init__(1)
        self.drawn: list[tuple[float, float, float]] = []

    def uniform(self, a: float, b: float) -> float:
        self.drawn.append((a, b, super().uniform(a, b)))
        return self.drawn[-1][2]


def test_back_off_doubles_with_full_jitter_and_leaves_the_global_random_state_alone() -> None:
    state = random.getstate()
    times = []

    def ask(attempt: Attempt) -> None:
        times.append(time.monotonic())
        raise Failure("failed", "broke", again=True)

    call = caller(retries=4, retry_delay=0.02)
    call._random = recorded = Recorded()
    with pytest.raises(BackendError, match=r"^the bee broke, tried 5 times$"):
        call(ask)
    assert [(low, high) for low, high, _ in recorded.drawn[:4]] == [(0, 0.02), (0, 0.04), (0, 0.08), (0, 0.16)]
    for (before, after), (_, _, delay) in zip(pairwise(times), recorded.drawn, strict=False):
        assert after - before >= delay
    assert random.getstate() == state


def test_no_wait_goes_beyond_the_deadline() -> None:
    def ask(attempt: Attempt) -> None:
        raise Failure("rate_limited", "is busy", again=True, wait=90)

    start = time.monotonic()
    with pytest.raises(BackendError, match=r"^the bee is busy$"):
        caller(deadline=60)(ask)
    assert time.monotonic() - start < 30


def test_what_others_were_told_to_wait_does_not_stretch_a_deadline() -> None:
    call = caller(deadline=0.3, retry_delay=0.0)

    def ask(attempt: Attempt) -> None:
        call._next_slot = time.monotonic() + 60
        raise Failure("failed", "broke", again=True)

    start = time.monotonic()
    with pytest.raises(BackendError, match="deadline"):
        call(ask)
    assert time.monotonic() - start < 30


def test_an_error_that_is_not_the_server_s_goes_through() -> None:
    def ask(attempt: Attempt) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        caller()(ask)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0), ({"retry-after": "7"}, 7), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25), ({"retry-after": "-3"}, 0), ({"retry-after": "soon"}, 0),
        ({"retry-after": "nan"}, 0), ({"retry-after": formatdate(time.time() - 60, usegmt=True)}, 0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_as_a_date_to_come() -> None:
    assert 55 < retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60


def test_answers_come_as_they_are_done() -> None:
    gates = [threading.Event() for _ in range(3)]

    def answer(messages: object, cancelled: threading.Event) -> Answer:
        index = int(messages[0]["content"])  # type: ignore[index]
        gates[index].wait(5)
        return Answer(str(index), "stop")

    found = concurrently(answer, [[{"role": "user", "content": str(i)}] for i in range(3)], 3)
    for index in (2, 0, 1):
        gates[index].set()
        assert next(found) == (index, Answer(str(index), "stop"))
    assert list(found) == []


def test_a_bug_in_a_thread_is_raised_where_the_answers_are_awaited() -> None:
    def answer(messages: object, cancelled: threading.Event) -> Answer:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(concurrently(answer, [HELLO] * 3, 2))


def test_closing_tells_those_at_work_and_starts_no_more() -> None:
    started, told = [], threading.Event()

    def answer(messages: object, cancelled: threading.Event) -> Answer:
        started.append(1)
        if len(started) > 1 and cancelled.wait(5):
            told.set()
        return Answer("x", "stop")

    found = concurrently(answer, [HELLO] * 100, 1)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert told.wait(2)
    time.sleep(0.05)
    assert len(started) == 2


def test_an_error_that_lasts_is_the_answer_to_all_that_follow() -> None:
    error = BackendError("unreachable", "gone")
    asked = []

    def answer(messages: object, cancelled: threading.Event) -> Answer:
        asked.append(1)
        if len(asked) == 3:
            raise error
        return Answer("x", "stop")

    found = [result for _, result in concurrently(answer, [HELLO] * 10, 1)]
    assert found == [Answer("x", "stop")] * 2 + [error] * 8
    assert len(asked) == 3


def written(pieces: list[str], stop: tuple[str, ...] = ()) -> tuple[list[str], Answer]:
    writing = Writing(10_000, StopText(stop))
    given_out = []
    for text in pieces:
        given_out.append(
            writing.add(Piece(text, tokens=((TokenChoice(text, -1.0), text.encode(errors="surrogatepass")),)))
        )
        if writing.finished:
            break
    else:
        writing.add(Piece(finish="stop"))
    given_out.append(writing.end())
    return given_out, writing.answer


@st.composite
def cut_up(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


TAGS = ["<think>", "</think>", "\n</think>\n\n", "<thi", "nk>"]
PARTS = st.lists(st.sampled_from([*TAGS, " ", "\n", "a", "ä", "🐝", "stop", "st", "op"]), max_size=8).map("".join)


@example(["\n</think>", "\n", "\na"], ())
@given(cut_up(PARTS), st.sampled_from([(), ("stop",)]))
def test_how_a_text_is_cut_into_pieces_changes_nothing(pieces: list[str], stop: tuple[str, ...]) -> None:
    given_out, answer = written(pieces, stop)
    whole = "".join(pieces)
    expected = whole
    if whole.lstrip().startswith("<think>"):
        expected = whole.partition("</think>")[2].lstrip()
    if stop:
        expected = expected.partition("stop")[0]
    assert "".join(given_out) == expected
    _, closed, rest = expected.partition("\n</think>\n\n")  # only the end of thoughts is there: known when all is said
    assert answer.text == written([whole], stop)[1].text == (rest if closed else expected)


@given(cut_up(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)))
def test_tokens_spell_the_text(pieces: list[str]) -> None:
    _, answer = written(pieces)
    assert "".join(token.text for token in answer.tokens) == answer.text == "".join(pieces)


@given(st.text("a🐝ä", min_size=1))
def test_characters_in_halves_are_joined(text: str) -> None:
    units = text.encode("utf-16-le")
    halves = [units[at : at + 2].decode("utf-16-le", "surrogatepass") for at in range(0, len(units), 2)]
    given_out, answer = written(halves)
    assert answer.text == text
    for piece in given_out:
        piece.encode()  # would raise on half a character


def test_tokens_that_spell_something_else_are_left_out() -> None:
    writing = Writing(100, StopText(()))
    writing.add(Piece("abc", tokens=((TokenChoice("xyz", -1.0), b"xyz"),), finish="stop"))
    writing.end()
    assert writing.answer == Answer("abc", "stop")
