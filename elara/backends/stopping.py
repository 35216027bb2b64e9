"""Stop texts: where one appears an answer ends, and nothing of it has been shown before."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Takes an answer piece by piece and hands out what no stop text can begin in any more. fed: characters so far."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.met = False
        self.fed = 0

    def feed(self, piece: str) -> str:
        """The text that is certain to belong to the answer; `met` tells that the answer ends behind it."""
        self.fed += len(piece)
        text, self._held = self._held + piece, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.met = True
            return text[: min(found)]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                self._held = text[start:]
                return text[:start]
        return text

    def flush(self) -> str:
        """What is left at the end of an answer."""
        held, self._held = self._held, ""
        return held
