"""Passages of documents, found by the words of a question (SQLite's FTS5, ranked by bm25) and put before it."""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from elara.errors import ElaraError

WORDS = 32  # of a question that are searched for, the rarest; a long one needs no more to find its passages


def cut(pieces: Iterable[str], length: int) -> Iterator[str]:
    """The passages of a text: at most `length` characters, up to the last space where one is in the last quarter.

    pieces: of the text, read only as far as passages are asked for.
    """
    kept = ""
    for piece in pieces:
        kept += piece
        start = 0
        while (end := start + length) < len(kept):
            spaces = [match.start() for match in re.finditer(r"\s", kept[end - length // 4 : end + 1])]
            end = end - length // 4 + spaces[-1] if spaces else end
            if passage := kept[start:end].strip():
                yield passage
            start = end
        kept = kept[start:]
    if passage := kept.strip():
        yield passage


def question_with(passages: Sequence[str], question: str) -> str:
    """What a user's message says when memory was searched: the one form that a model learns and is asked in.

        Passages:
        [1] the best one
        [2] ...

        Question: what was asked

    Without passages it is the question alone.
    """
    if not passages:
        return question
    lines = [f"[{number}] {passage}" for number, passage in enumerate(passages, 1)]
    return "\n".join(["Passages:", *lines, "", f"Question: {question}"])


class Search:
    """An index in memory over passages. Only runs of letters and digits are searched for, in any case: whatever else a
    question holds, quotes and operators included, parts its words."""

    def __init__(self, passages: Iterable[str]) -> None:
        self.passages = list(passages)
        self._holding: Counter[str] = Counter()  # word -> passages that hold it
        self._index = sqlite3.connect(":memory:")
        try:
            self._index.execute("CREATE VIRTUAL TABLE passages USING fts5(words, content='')")
        except sqlite3.OperationalError as error:
            raise ElaraError(
                f"searching passages needs SQLite with FTS5, which this Python lacks ({error}): set "
                "data.honeycomb.rag.k=0, or use another build of Python"
            ) from error
        for row, passage in enumerate(self.passages):
            own = words(passage)
            self._holding.update(set(own))
            self._index.execute("INSERT INTO passages (rowid, words) VALUES (?, ?)", (row, " ".join(own)))

    def best(self, question: str, k: int) -> list[str]:
        """At most k passages that share a word with the question, best first; of equals the earlier one.

        Words of more than half of the passages are searched for only where there are no others: bm25 gives them no
        weight, and every passage would be found by them.
        """
        known = sorted({*words(question)} & self._holding.keys(), key=lambda word: (self._holding[word], word))
        wanted = [word for word in known if 2 * self._holding[word] <= len(self.passages)][:WORDS] or known[:WORDS]
        if not wanted or k < 1:
            return []
        found = self._index.execute(
            "SELECT rowid FROM passages WHERE passages MATCH ? ORDER BY bm25(passages), rowid LIMIT ?",
            (" OR ".join(f'"{word}"' for word in wanted), k),
        )
        return [self.passages[row] for (row,) in found]


def words(text: str) -> list[str]:
    """Runs of letters and digits, in small letters."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
