"""Asking a server again, within bounds: back-off with full jitter, a deadline per answer, requests side by side.

The official clients' own retries are off: they know neither an answer's deadline nor a stream that broke in the middle.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from elara.backends.base import Answer, BackendError, Messages

T = TypeVar("T")
LONGEST_DELAY = 60.0  # seconds that back-off grows to; a server's Retry-After may be longer


class Failure(Exception):
    """Why one attempt failed.

    kind: of the BackendError that it becomes. again: whether asking again may help. wait: seconds that the server asked
    to be left alone. advice: what the user can do.
    """

    def __init__(self, kind: str, why: str, advice: str = "", *, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(why)
        self.kind, self.why, self.advice, self.again, self.wait = kind, why, advice, again, wait


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Limits:
    """How much patience an answer gets."""

    timeout: float = 60.0  # seconds without a byte
    deadline: float = 600.0  # seconds per answer in all, retries and waiting included
    retries: int = 4  # attempts after the first one
    retry_delay: float = 0.5  # seconds; attempt n waits a random time up to this times 2^n
    max_characters: int = 100_000  # of an answer and the thoughts before it
    requests_per_minute: float | None = None  # spaced evenly; None = no limit

    def __post_init__(self) -> None:
        for name in ("timeout", "deadline", "max_characters"):
            if getattr(self, name) <= 0:
                raise BackendError("refused", f"a backend's {name} is {getattr(self, name)}: give a number above 0")
        for name in ("retries", "retry_delay"):
            if getattr(self, name) < 0:
                raise BackendError("refused", f"a backend's {name} is {getattr(self, name)}: give 0 or more")
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise BackendError("refused", "a backend's requests_per_minute must be above 0, or null for no limit")


@dataclass
class Attempt:
    """One request: what it may still cost, and what its response's head said."""

    timeout: float
    ends: float  # on the monotonic clock
    cancelled: threading.Event
    empty: int = 0  # attempts before this one that brought an empty answer
    status: int | None = None
    wait: float = 0.0  # Retry-After in seconds

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def check(self) -> None:
        """Raise when nobody waits any more or the time is over."""
        if self.cancelled.is_set():
            raise Cancelled
        if self.left <= 0:
            raise Failure("timeout", "did not finish its answer within `deadline`", "raise `deadline`, or ask for less")


@dataclass
class Caller:
    """The one place that retries. whom: how messages call the server. translate: a client's exception as a Failure."""

    whom: Callable[[], str]
    limits: Limits
    translate: Callable[[Exception, Attempt], Failure]
    _random: random.Random = field(default_factory=random.Random)  # the global one is part of a training run's state
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next_slot: float = 0.0

    def __call__(
        self, ask: Callable[[Attempt], T], cancelled: threading.Event | None = None, *, endless: bool = False
    ) -> T:
        """What `ask` returns, after at most 1 + `retries` attempts.

        endless: no deadline, for what takes as long as it takes, such as a download; `timeout` still holds.
        """
        cancelled = cancelled or threading.Event()
        self._wait_for_slot(cancelled)  # waiting for one's turn is not the answer's time
        ends = float("inf") if endless else time.monotonic() + self.limits.deadline
        number, empty = 1, 0
        while True:
            attempt = Attempt(self.limits.timeout, ends, cancelled, empty)
            try:
                attempt.check()
                return ask(attempt)
            except Exception as error:
                failure = self.failure(error, attempt)
            delay = failure.wait + self._random.uniform(
                0, min(LONGEST_DELAY, self.limits.retry_delay * 2 ** (number - 1))
            )
            if not failure.again or number > self.limits.retries or delay >= attempt.left:
                raise self.error(failure, number)
            if failure.wait:  # nobody else need find it out
                with self._lock:
                    self._next_slot = max(self._next_slot, time.monotonic() + failure.wait)
            if cancelled.wait(delay):
                raise Cancelled
            self._wait_for_slot(cancelled, ends)
            number, empty = number + 1, empty + (failure.kind == "empty")

    def failure(self, error: Exception, attempt: Attempt) -> Failure:
        """`error` or what caused it, as a Failure; errors that are not the server's go through as they are."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (Cancelled, BackendError)):
                raise cause from None
            if isinstance(cause, Failure):
                return cause
            cause = cause.__cause__
        return self.translate(error, attempt)

    def error(self, failure: Failure, attempts: int = 1) -> BackendError:
        """One sentence: which server and model, what happened, how often it was tried, what to do."""
        tried = f", tried {attempts} times" if attempts > 1 else ""
        advice = f": {failure.advice}" if failure.advice else ""
        return BackendError(failure.kind, f"{self.whom()} {failure.why}{tried}{advice}")

    def _wait_for_slot(self, cancelled: threading.Event, ends: float = float("inf")) -> None:
        """Wait until the server's own wish and requests_per_minute allow a request, at the longest until `ends`."""
        per_minute = self.limits.requests_per_minute
        with self._lock:
            slot = max(self._next_slot, time.monotonic())
            if per_minute is not None:
                self._next_slot = slot + 60 / per_minute
        if cancelled.wait(max(0.0, min(slot, ends) - time.monotonic())):
            raise Cancelled


def concurrently(
    function: Callable[[Messages, threading.Event], Answer], conversations: Sequence[Messages], limit: int
) -> Iterator[tuple[int, Answer | BackendError]]:
    """(index, answer or error) of every conversation as they are done, at most `limit` at once.

    function: may look at the event, which is set when nobody waits any more. After an error that lasts no further
    request is started: the rest yield that error. The threads are daemons: closing the generator, Ctrl-C and the end of
    the process wait for none of them.
    """
    cancelled, lock = threading.Event(), threading.Lock()
    indices = iter(range(len(conversations)))
    done: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
    lasting: list[BackendError] = []

    def work() -> None:
        while not cancelled.is_set():
            with lock:
                index = next(indices, None)
            if index is None:
                return
            if lasting:
                done.put((index, lasting[0]))
                continue
            try:
                done.put((index, function(conversations[index], cancelled)))
            except Cancelled:
                return
            except BaseException as error:  # whatever it is, the one who waits must hear of it
                if isinstance(error, BackendError) and error.lasting:
                    lasting.append(error)
                done.put((index, error))

    try:
        for _ in range(min(max(1, limit), len(conversations))):
            threading.Thread(target=work, daemon=True, name="elara-backend").start()
        for _ in conversations:
            index, result = done.get()
            if not isinstance(result, (Answer, BackendError)):
                raise result
            yield index, result
    finally:
        cancelled.set()
