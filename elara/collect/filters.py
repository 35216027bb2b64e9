"""Which answers are kept, and why the others are not. The first reason counts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from elara.collect.config import FilterConfig
from elara.collect.duplicates import Duplicates
from elara.collect.language import check_language, is_other
from elara.collect.student import Student
from elara.data.samples import Sample

BEGINNING = 200  # characters of an answer that are searched for a refusal: further on it is a quotation


class Filters:
    """Judges answers in the order of the store, of which it remembers those that it kept.

    Raises ElaraError for a language that is not known or a student that is not there.
    """

    def __init__(self, wanted: FilterConfig, student: Student | None) -> None:
        check_language(wanted.language)
        self._wanted, self._student = wanted, student
        self._refusals = [re.compile(pattern, re.IGNORECASE) for pattern in wanted.refusals]
        self._duplicates = Duplicates(wanted.duplicates == "near", wanted.similarity)

    def reasons(self, samples: Sequence[Sample]) -> list[str | None]:
        """For each answer why it is rejected, None = kept: too_short, too_long, cut_off, refusal, language,
        unreadable, too_likely, too_unlikely, duplicate, near_duplicate."""
        reasons = [self._by_text(sample) for sample in samples]
        if self._student is not None:
            left = [i for i, reason in enumerate(reasons) if reason is None]
            for i, nats in zip(left, self._student.nats_per_byte([answer(samples[i]) for i in left]), strict=True):
                reasons[i] = self._by_likelihood(nats)
        if self._wanted.duplicates != "none":  # last: what is rejected for another reason stands in nobody's way
            for i, sample in enumerate(samples):
                if reasons[i] is None:
                    reasons[i] = self._duplicates.kind(answer(sample), sample.provenance["prompt"])
        return reasons

    def _by_text(self, sample: Sample) -> str | None:
        wanted, text = self._wanted, answer(sample).strip()
        if len(text) < wanted.min_chars:
            return "too_short"
        if wanted.max_chars is not None and len(text) > wanted.max_chars:
            return "too_long"
        if wanted.cut_off and sample.provenance["finish"] == "length":
            return "cut_off"
        if any(pattern.search(text[:BEGINNING]) for pattern in self._refusals):
            return "refusal"
        if wanted.language is not None and is_other(text, wanted.language):
            return "language"
        return None

    def _by_likelihood(self, nats: float | None) -> str | None:
        low, high = self._wanted.min_nats, self._wanted.max_nats
        if nats is None:
            return "unreadable"
        if low is not None and nats < low:
            return "too_likely"
        return "too_unlikely" if high is not None and nats > high else None


def answer(sample: Sample) -> str:
    """The text of an answer in the store."""
    assert sample.messages
    return sample.messages[-1]["content"]
