"""Hydra's schema of `python -m elara.collect`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from elara.backends import Params, TeacherConfig
from elara.data import DataConfig
from elara.errors import ElaraError

SPLITS = ("line", "paragraph", "file")
ASKING = ("all", "share")
DUPLICATES = ("none", "exact", "near")
THREAD = "teacher "  # begins the names of the threads that ask


@dataclass
class PromptsConfig:
    """Section `prompts`: what is asked."""

    path: str | None = None  # samples (.jsonl, .parquet, a folder of them) or a text file; null = passages of `data`
    split: str = "line"  # of a text file, one of SPLITS
    template: str | None = None  # with {passage}; null = texts as they are, passages of `data` are to be continued
    system: str | None = None  # put before prompts that have no system message
    passage: int = 600  # characters of a passage of `data`
    limit: int | None = 1000  # prompts; null = all
    seed: int | None = 0  # of which ones `limit` takes; null = the first

    def __post_init__(self) -> None:
        _among("prompts.split", self.split, SPLITS)
        _at_least("prompts.passage", self.passage, 16)
        if self.limit is not None:
            _at_least("prompts.limit", self.limit, 1)
        if self.template is not None and "{passage}" not in self.template:
            raise ElaraError(f"prompts.template={self.template!r} must hold {{passage}}, where the text goes")


@dataclass
class SamplingConfig:
    """Section `sampling`: how answers are written, as in `elara.backends.Params`."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    logprobs: int = 0

    def __post_init__(self) -> None:
        _at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        for key in ("temperature", "top_k", "logprobs"):
            _at_least(f"sampling.{key}", getattr(self, key), 0)
        if not 0 < self.top_p <= 1:
            raise ElaraError(f"sampling.top_p={self.top_p} must be above 0 and at most 1")

    def params(self) -> Params:
        return Params(
            self.max_new_tokens, self.temperature, self.top_k, self.top_p, self.seed, tuple(self.stop), self.logprobs
        )


@dataclass
class FilterConfig:
    """Section `filters`: which answers are kept; the store keeps all."""

    min_chars: int = 1
    max_chars: int | None = None
    cut_off: bool = False  # whether answers that max_new_tokens ended are rejected
    refusals: list[str] = field(default_factory=list)  # regular expressions, looked for in the first characters
    language: str | None = None  # see elara.collect.language
    duplicates: str = "near"  # one of DUPLICATES
    similarity: float = 0.8  # share of common word triples from which two answers are near duplicates
    student: str | None = None  # checkpoint, run folder or run name
    min_nats: float | None = None  # per UTF-8 byte of the answer under the student
    max_nats: float | None = None

    def __post_init__(self) -> None:
        _at_least("filters.min_chars", self.min_chars, 0)
        if self.max_chars is not None:
            _at_least("filters.max_chars", self.max_chars, max(1, self.min_chars))
        _among("filters.duplicates", self.duplicates, DUPLICATES)
        if not 0 < self.similarity <= 1:
            raise ElaraError(f"filters.similarity={self.similarity} must be above 0 and at most 1")
        for pattern in self.refusals:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ElaraError(f"filters.refusals: {pattern!r} is no regular expression ({error})") from error
        bounds = (self.min_nats, self.max_nats)
        if any(bound is not None for bound in bounds) != (self.student is not None):
            raise ElaraError("filters.student needs filters.min_nats or filters.max_nats, and these need a student")


@dataclass
class StoreConfig:
    """Section `store`."""

    parquet: bool = False  # a copy of all answers as answers.parquet


@dataclass
class CollectConfig:
    """Schema of conf/collect.yaml."""

    name: str = "teachers"  # of the store: data/collected/<name>
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: dict[str, Any] = field(default_factory=dict)  # data sets bring one; teachers have their own
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    ask: str = "all"  # one of ASKING
    give_up: int = 20  # failures in a row that end a teacher
    minutes: float | None = None  # of asking; null = until all is answered
    device: str = "auto"  # of the student
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w.-]*", self.name):
            raise ElaraError(f"name={self.name!r} must be a plain name: letters, digits, '.', '_' and '-'")
        _among("ask", self.ask, ASKING)
        _at_least("give_up", self.give_up, 1)
        if self.minutes is not None and not self.minutes > 0:
            raise ElaraError(f"minutes={self.minutes} must be above 0, or null")
        for name, teacher in self.teachers.items():
            if not (teacher.weight >= 0 and math.isfinite(teacher.weight)):
                raise ElaraError(f"teachers.{name}.weight={teacher.weight} must be a number of at least 0")
        if self.teachers and self.ask == "share" and not any(t.weight for t in self.teachers.values()):
            raise ElaraError("ask=share needs a teacher with a weight above 0")


def _among(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ElaraError(f"{key}={value} must be one of: {', '.join(known)}")


def _at_least(key: str, value: float, low: float) -> None:
    if not (value >= low and math.isfinite(value)):
        raise ElaraError(f"{key}={value} must be at least {low}")
