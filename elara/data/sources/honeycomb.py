"""Memory as a corpus: documents, rated feedback and teachers' answers, with passages of the documents for questions."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from elara.data.config import HoneycombConfig
from elara.data.hashes import fraction
from elara.data.passages import Search, cut, question_with
from elara.data.samples import Message, Sample
from elara.data.sources.base import SPLITS, Counts, Split
from elara.data.sources.samples import Chat
from elara.errors import ElaraError
from elara.tokenizer import Tokenizer

VERSION = 1  # of what is made of samples; another one is prepared anew
MOST = 100  # copies of a sample; more is a mistake


class Honeycomb(Chat):
    """Samples of the schema of `elara.data.samples`: `document`, `feedback`, `teacher`; others by what they hold.

    What holds of the split: all about one question lies in one part of it, and a question meets passages of its own
    part's documents only. So no document that validates is read, as text or as passage, by what is trained; and what
    validates is not helped by a text that was learned. Mixing weights change the training part alone.
    """

    def __init__(self, path: str, val_fraction: float, settings: HoneycombConfig, root: Path) -> None:
        super().__init__(path, val_fraction, root)
        _check(settings)
        self._settings = settings
        self._mix: dict[str, float] = asdict(settings.mix)
        self._low = 0

    def identity(self) -> dict[str, Any]:
        settings = {**asdict(self._settings), "rag": asdict(self._settings.rag) if self._settings.rag.k else None}
        return {**super().identity(), "source": "honeycomb", "version": VERSION, "honeycomb": settings}

    def samples(self) -> Iterator[Sample]:
        return self._made(SPLITS)

    def samples_of(self, split: Split) -> Iterator[Sample]:
        return self._made((split,))

    def _made(self, splits: tuple[Split, ...]) -> Iterator[Sample]:
        """What is learned and validated. Copies come in rounds: side by side in one window, the second would be read
        off the first."""
        if self._settings.rag.k:
            _ = self._searches  # refuses memory without documents, whatever dropout leaves to search
        kept = trainable = trained = left = 0
        for done in range(max(1, math.ceil(max(self._mix.values()))) if "train" in splits else 1):
            for sample in super().samples():
                rated = _rated(sample, self._settings.min_rating)
                if rated is None:
                    left += done == 0
                    continue
                split = self.split_of(sample)
                kept += done == 0
                trainable += done == 0 and split == "train"
                if done >= (1 if split == "val" else self._copies(sample)):
                    continue
                trained += split == "train"
                if split in splits:
                    yield self._with_passages(rated, split)
        self._low = left
        if not kept:
            low = f"{left:,} rated below data.honeycomb.min_rating={self._settings.min_rating:g}: lower it"
            raise ElaraError(f"{self.name}: no sample is left, " + (low if left else "its files are empty"))
        if trainable and not trained:
            raise ElaraError(f"{self.name}: data.honeycomb.mix={self._mix} leaves nothing to train on: raise a weight")

    def write(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], work: Path) -> Counts:
        counts = super().write(folder, tokenizer, dtype, work)
        if self._low:
            limit = f"data.honeycomb.min_rating={self._settings.min_rating:g}"
            print(f"note: {self._low:,} feedback samples rated below {limit} are left out", file=sys.stderr, flush=True)
        if self._settings.rag.k:
            for split in SPLITS:
                if not self._searches[split].passages:
                    print(f"note: no document fell to the {split} part: its questions stay without passages",
                          file=sys.stderr, flush=True)  # fmt: skip
        return counts

    def _copies(self, sample: Sample) -> int:
        weight = self._mix[_kind(sample)]
        return int(weight) + (fraction(sample.id, "mix") < weight % 1)

    def _with_passages(self, sample: Sample, split: Split) -> Sample:
        rag = self._settings.rag
        asked = _question(sample.messages or ())
        if not rag.k or sample.messages is None or asked is None or fraction(sample.id, "rag") < rag.dropout:
            return sample
        question = sample.messages[asked]["content"]
        content = question_with(self._searches[split].best(question, rag.k), question)
        provenance = {**sample.provenance, "prompt": self.split_key(sample)}  # which the new words would change
        return replace(sample, messages=_replaced(sample.messages, asked, content), provenance=provenance)

    @cached_property
    def _searches(self) -> dict[Split, Search]:
        """An index of each part's documents."""
        found: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for sample in super().samples():
            if sample.text is not None:
                found[self.split_of(sample)] += cut([sample.text], self._settings.rag.passage)
        if not any(found.values()):
            raise ElaraError(
                f"{self.name} holds no document to search: data.honeycomb.rag.k={self._settings.rag.k} needs samples "
                "with text; give some, or set data.honeycomb.rag.k=0"
            )
        return {split: Search(passages) for split, passages in found.items()}


def _check(settings: HoneycombConfig) -> None:
    """ElaraError that names the first setting which is out of range."""
    rag, where = settings.rag, "data.honeycomb"
    ranges = {f"{where}.mix.{kind}": (weight, MOST) for kind, weight in asdict(settings.mix).items()}
    ranges |= {f"{where}.min_rating": (settings.min_rating, 1), f"{where}.rag.dropout": (rag.dropout, 1)}
    for key, (value, most) in ranges.items():
        if not 0 <= value <= most:
            raise ElaraError(f"{key}={value:g} must be from 0 to {most}")
    if rag.k < 0 or rag.passage < 1:
        raise ElaraError(f"{where}.rag.k={rag.k} must be at least 0 and {where}.rag.passage={rag.passage} at least 1")


def _kind(sample: Sample) -> str:
    """The mixing weight that a sample falls under."""
    if sample.text is not None:
        return "document"
    return "feedback" if sample.source == "feedback" else "teacher"


def _rated(sample: Sample, min_rating: float) -> Sample | None:
    """Feedback with its correction and its rating as weight; None when it is rated too low; else the sample itself."""
    if sample.source != "feedback":
        return sample
    if sample.messages is None:
        raise ElaraError(f"sample {sample.id} is feedback without messages: give the question and its answer")
    rating: Any = sample.provenance.get("rating")
    correction = sample.provenance.get("correction")
    number = isinstance(rating, int | float) and not isinstance(rating, bool) and 0 <= rating <= 1
    if not number and (correction is None or rating is not None):
        raise ElaraError(f"sample {sample.id} has provenance.rating {rating!r}: give a number from 0, bad, to 1, good")
    messages = sample.messages
    if correction is not None:
        rating = 1.0  # the rating was of the answer that goes; what the user wrote instead is what is wanted
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not isinstance(correction, str) or not correction or not answers:
            raise ElaraError(f"sample {sample.id} has a provenance.correction that is no text, or no answer to replace")
        messages = _replaced(messages, answers[-1], correction)
    if rating < min_rating:
        return None
    # A mean of losses by weight: an answer liked half as much pulls half as hard, without another threshold. Those
    # below min_rating are no weak examples but bad ones, and likelihood has no way to learn from what to avoid.
    return replace(sample, messages=messages, weight=sample.weight * rating)


def _question(messages: tuple[Message, ...]) -> int | None:
    """Where the user asks what the last answer answers."""
    roles = [message["role"] for message in messages]
    answer = max((i for i, role in enumerate(roles) if role == "assistant"), default=len(roles))
    return max((i for i, role in enumerate(roles[:answer]) if role == "user"), default=None)


def _replaced(messages: tuple[Message, ...], at: int, content: str) -> tuple[Message, ...]:
    return (*messages[:at], {**messages[at], "content": content}, *messages[at + 1 :])
