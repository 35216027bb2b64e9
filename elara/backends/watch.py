"""Bounds that are kept where the bytes arrive. Both official clients are httpx underneath."""

from __future__ import annotations

import codecs
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from elara.backends.retry import Attempt, Failure

LONGEST_LINE = 1 << 25  # bytes; an answer comes in short lines, vectors and lists of models in one


class Watch:
    """Event hooks of an httpx client, which hold every request to the attempt that its thread is in."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def begin(self, attempt: Attempt) -> None:
        """Requests that this thread sends from now on belong to `attempt`."""
        self._thread.attempt = attempt

    @property
    def hooks(self) -> dict[str, list[Callable[[Any], None]]]:
        return {"request": [self._on_request], "response": [self._on_response]}

    def _on_request(self, request: Any) -> None:
        attempt: Attempt = self._thread.attempt
        attempt.check()
        seconds = min(attempt.timeout, attempt.left)
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def _on_response(self, response: Any) -> None:
        attempt: Attempt = self._thread.attempt
        attempt.status = response.status_code
        attempt.wait = retry_after(response.headers)
        # Everything that reads a response, lines and whole bodies included, goes through this method.
        response.iter_bytes = _watched(response.iter_bytes, attempt)


def _watched(iter_bytes: Callable[..., Iterator[bytes]], attempt: Attempt) -> Callable[..., Iterator[bytes]]:
    def watched(chunk_size: int | None = None) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")()  # strict, and at ease with characters in two chunks
        line = 0
        for chunk in iter_bytes(chunk_size):
            attempt.check()
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                raise Failure("not_text", "sent bytes that are not UTF-8", "look at what answers there") from None
            cut = chunk.rfind(b"\n")
            line = line + len(chunk) if cut < 0 else len(chunk) - cut - 1
            if line > LONGEST_LINE:
                raise Failure(
                    "endless", f"sent a line of more than {LONGEST_LINE >> 20} MB", "look at what answers there"
                )
            yield chunk

    return watched


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, given as a number or as a date; 0 = it does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            seconds = float(headers[name]) * unit
            return max(0.0, seconds) if not math.isnan(seconds) else 0.0
    with contextlib.suppress(KeyError, ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return 0.0
