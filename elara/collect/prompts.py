"""What is asked: conversations without their last answer, lines of a file, or passages of a corpus."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from elara.collect.config import PromptsConfig
from elara.data import DataConfig
from elara.data.hashes import digest
from elara.data.passages import cut
from elara.data.samples import SUFFIXES, Message, Sample, prompt_id, read_samples, sample_files
from elara.data.sources import Source, open_source
from elara.data.sources.samples import SampleSource
from elara.errors import ElaraError

CONTINUE = "Continue this text:\n\n{passage}"  # the template of passages where none is given
READ = 200_000  # passages that a draw looks at, at most: a corpus may be larger than anyone wants to read


@dataclass(frozen=True)
class Prompt:
    """A conversation whose next message is asked for. id: hash of its messages, the same in every run."""

    id: str
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, messages: Iterable[Message]) -> Prompt:
        own = tuple({"role": m["role"], "content": m["content"]} for m in messages)
        return cls(prompt_id(own), own)


@dataclass(frozen=True)
class Prompts:
    """prompts: each once, in the order in which they are asked. found: how many different ones there were to choose
    from. repeated, unanswerable: samples left out, because they ask what another one asks, or ask nothing."""

    prompts: list[Prompt]
    found: int
    repeated: int
    unanswerable: int


def read_prompts(wanted: PromptsConfig, data: DataConfig | None, root: Path) -> Prompts:
    """The prompts of a file, a folder or, with `data`, a corpus's training part.

    root: folder of downloads and prepared data. A larger `limit` with the same seed asks what the smaller one asked,
    and more. Raises ElaraError when there is nothing to ask, or both a path and data are given.
    """
    if (wanted.path is None) == (data is None):
        raise ElaraError("prompts come from one place: give prompts.path=<samples or a text file> or data=<a data set>")
    rows = _from_path(wanted) if data is None else _from_data(wanted, open_source(data, root))
    seen: set[str] = set()
    unanswerable = repeated = 0

    def distinct() -> Iterator[Prompt]:
        nonlocal unanswerable, repeated
        for prompt in rows:
            if prompt is None:
                unanswerable += 1
            elif prompt.id in seen:
                repeated += 1
            else:
                seen.add(prompt.id)
                yield prompt

    if wanted.seed is None:
        every = distinct()
        chosen = list(every if wanted.limit is None else islice(every, wanted.limit))
    elif wanted.limit is None:
        chosen = sorted(distinct(), key=lambda prompt: _rank(prompt, wanted.seed))
    else:
        chosen = heapq.nsmallest(wanted.limit, distinct(), key=lambda prompt: _rank(prompt, wanted.seed))
    if not chosen:
        where = wanted.path if data is None else f"data={data.name}"
        raise ElaraError(f"{where} holds nothing to ask: texts, or messages that end with a question, are needed")
    return Prompts(chosen, len(seen), repeated, unanswerable)


def question(sample: Sample) -> tuple[Message, ...] | None:
    """The messages before the last answer; None when no one is asked anything there."""
    messages = sample.messages or ()
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    asked = messages[: ends[-1]] if ends else messages
    return asked if asked and asked[-1]["role"] in ("user", "tool") else None


def passages(source: Source, length: int) -> Iterator[str]:
    """The training documents of a corpus, cut; the rest of one is left out when it is shorter than a quarter."""
    every = (passage for document in source.documents("train") for passage in cut(document, length))
    return (passage for passage in every if len(passage) >= length // 4)


def _from_path(wanted: PromptsConfig) -> Iterator[Prompt | None]:
    assert wanted.path is not None
    path = Path(wanted.path).expanduser()
    if path.is_file() and path.suffix not in SUFFIXES:
        return (_text(text, wanted, "{passage}") for text in _pieces(path, wanted.split))
    sample_files(path).note()
    return (_sample(sample, wanted) for sample in read_samples(path))


def _from_data(wanted: PromptsConfig, source: Source) -> Iterator[Prompt | None]:
    if isinstance(source, SampleSource):  # conversations are asked as they are
        return (_sample(sample, wanted) for sample in source.samples_of("train"))
    most = None if wanted.limit is None else max(READ, 16 * wanted.limit)
    return (_text(text, wanted, CONTINUE) for text in islice(passages(source, wanted.passage), most))


def _sample(sample: Sample, wanted: PromptsConfig) -> Prompt | None:
    if sample.text is not None:
        return _text(sample.text, wanted, "{passage}")
    messages = question(sample)
    return None if messages is None else _prompt(messages, wanted.system)


def _pieces(file: Path, split: str) -> Iterator[str]:
    """The lines, paragraphs (parted by empty lines) or the whole of a text file; empty ones are skipped."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ElaraError(f"{file} is not UTF-8 text (near byte {error.start}): convert it to UTF-8 first") from error
    except OSError as error:
        raise ElaraError(f"cannot read {file}: {error.strerror or error}") from error
    pieces = {"line": text.split("\n"), "paragraph": re.split(r"\n\s*\n", text), "file": [text]}[split]
    yield from (piece.strip() for piece in pieces if piece.strip())


def _text(text: str, wanted: PromptsConfig, template: str) -> Prompt | None:
    if not text.strip():
        return None
    content = (wanted.template or template).replace("{passage}", text)
    return _prompt(({"role": "user", "content": content},), wanted.system)


def _prompt(messages: tuple[Message, ...], system: str | None) -> Prompt:
    if system is not None and all(message["role"] != "system" for message in messages):
        messages = ({"role": "system", "content": system}, *messages)
    return Prompt.of(messages)


def _rank(prompt: Prompt, seed: int | None) -> str:
    return digest([seed, prompt.id])

