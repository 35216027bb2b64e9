"""Samples as a corpus: conversations, of which the assistant's words are learned, and texts, learned whole."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elara.data import tool_use
from elara.data.config import CorpusConfig
from elara.data.hashes import file_hash, fraction
from elara.data.passages import words
from elara.data.progress import Progress
from elara.data.samples import Message, Sample, prompt_id, read_samples, sample_files
from elara.data.sources.base import SPLITS, Counts, Split
from elara.data.tokens import TokenWriter
from elara.errors import ElaraError
from elara.tokenizer import TextError, Tokenizer

HEAVIEST = 1000.0  # a weight beyond is a mistake; float16 holds 65504


class SampleSource(ABC):
    """See `Source`. Every sample is a document; a hash decides whether it validates (`split_of`).

    A subclass says where samples come from: `identity` and `samples`, which is read several times.
    """

    def __init__(self, name: str, val_fraction: float) -> None:
        if not 0 < val_fraction <= 0.5:
            raise ElaraError(f"data.val_fraction={val_fraction} must be above 0 and at most 0.5")
        self.name, self.val_fraction = name, val_fraction

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """See `Source.identity`."""

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """All samples in a fixed order."""

    def text(self) -> Iterator[str]:
        for sample in self.samples():
            yield from _texts(sample)

    def documents(self, split: Split) -> Iterator[list[str]]:
        """Conversations as their messages' texts, a line each."""
        for sample in self.samples_of(split):
            yield ["\n".join([*_texts(sample), ""])]

    def place(self, split: Split, document: int) -> tuple[str, int]:
        return f"sample {document + 1} of the {split} part of {self.name}", 0

    def samples_of(self, split: Split) -> Iterator[Sample]:
        """The samples of one part."""
        return (sample for sample in self.samples() if self.split_of(sample) == split)

    def write(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], work: Path) -> Counts:
        silent = 0
        unread: dict[str, set[str]] = {}  # key -> samples
        writers = {split: TokenWriter(folder, split, dtype, weights=True) for split in SPLITS}
        with writers["train"], writers["val"], Progress("tokenising", unit="samples") as progress:
            for sample in self.samples():
                for key in sample.unread:
                    unread.setdefault(key, set()).add(sample.id)
                try:
                    ids, weights = tokens_of(sample, tokenizer)
                except TextError as error:
                    raise error.within(self.name) from error
                progress.advance(1)
                if not weights.any():
                    silent += 1
                    continue
                writer = writers[self.split_of(sample)]
                writer.write(ids, sum(map(len, _texts(sample))), weights)
                writer.end_document()
        counts: Counts = {split: writer.counts for split, writer in writers.items()}
        if silent and not any(count["documents"] for count in counts.values()):
            raise ElaraError(f"{self.name}: none of its {silent:,} samples has words of an assistant to learn")
        for split in SPLITS:
            if not counts[split]["documents"]:
                raise ElaraError(f"{self.name}: no sample fell to the {split} part; give more or set data.val_fraction")
        if silent:
            what = "samples have nothing to learn (no assistant message, or weight 0) and are left out"
            print(f"note: {silent:,} {what}", file=sys.stderr, flush=True)
        if unread:
            listed = ", ".join(f"{key} ({len(samples):,} samples)" for key, samples in sorted(unread.items()))
            print(f"note: words under these keys are not learned: {listed}", file=sys.stderr, flush=True)
        return counts

    def split_of(self, sample: Sample) -> Split:
        """The split of a sample, by its `split_key` alone: adding others moves none."""
        return "val" if fraction(self.split_key(sample)) < self.val_fraction else "train"

    def split_key(self, sample: Sample) -> str:
        """What decides the split: of a conversation its question, whoever answers it, under whatever system message and
        however the talk goes on, so that no question stands in both parts; of a text its id.

        A prompt that is named and is another one than this conversation's own stands for its question: so answers to
        one question in other words stay together, and those before which passages were put.
        """
        prompt = sample.provenance.get("prompt")
        if sample.messages is None:
            return str(prompt or sample.id)
        if prompt and prompt != prompt_id(sample.messages[: _last_answer(sample.messages)]):
            return str(prompt)
        return prompt_id(first_question(sample.messages))


class Chat(SampleSource):
    """Samples in files of the schema of `elara.data.samples`."""

    def __init__(self, path: str, val_fraction: float, root: Path) -> None:
        super().__init__(f"data.path={path}", val_fraction)
        self._path, self._root = Path(path).expanduser().resolve(), root
        self._found = sample_files(self._path)

    def identity(self) -> dict[str, Any]:
        return {
            "source": "chat",
            "path": str(self._path),
            "sha256": {str(file): file_hash(file, self._root) for file in self._found.files},
            "val_fraction": self.val_fraction,
            "split": "by question",
        }

    def samples(self) -> Iterator[Sample]:
        return read_samples(self._path)

    def write(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], work: Path) -> Counts:
        self._found.note()
        return super().write(folder, tokenizer, dtype, work)


class ToolUse(SampleSource):
    """Generated conversations in which a tool is called and answers (`elara.data.tool_use`)."""

    def __init__(self, count: int, seed: int, families: list[str], val_fraction: float) -> None:
        super().__init__("data=tool_use", val_fraction)
        if count < 2:
            raise ElaraError(f"data.samples={count} must be at least 2")
        tool_use.check_families(families)
        self._count, self._seed, self._families = count, seed, families

    def identity(self) -> dict[str, Any]:
        return {
            "source": "tool_use",
            "generator": tool_use.VERSION,
            "samples": self._count,
            "seed": self._seed,
            "families": self._families,
            "split": "by question",
            "val_fraction": self.val_fraction,
        }

    def samples(self) -> Iterator[Sample]:
        return tool_use.conversations(self._count, self._seed, self._families)

    def split_key(self, sample: Sample) -> str:
        """The words of the question, so that no way of writing it is learned where another one validates."""
        assert sample.messages is not None
        return " ".join(words(first_question(sample.messages)[0]["content"]))


def open_samples(data: CorpusConfig, root: Path) -> SampleSource:
    """The source for `data.source` chat or tool_use; ElaraError when its settings are incomplete."""
    if data.source == "tool_use":
        return ToolUse(data.samples, data.samples_seed, list(data.families), data.val_fraction)
    if data.path is None:
        raise ElaraError(f"data={data.source} needs data.path=<a .jsonl or .parquet file of samples, or a folder>")
    return Chat(data.path, data.val_fraction, root)


def first_question(messages: Sequence[Message]) -> Sequence[Message]:
    """What the user says before the first answer to it; all messages where no user speaks."""
    asked = list[Message]()
    for message in messages:
        if message["role"] == "assistant" and asked:
            break
        if message["role"] == "user":
            asked.append(message)
    return asked or messages


def _last_answer(messages: Sequence[Message]) -> int:
    """Where the last answer stands; behind all messages where there is none."""
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))


def tokens_of(sample: Sample, tokenizer: Tokenizer) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]:
    """Ids of a sample and what each counts as a target; ElaraError for a weight or words that cannot be kept."""
    if sample.weight > HEAVIEST:
        raise ElaraError(f"sample {sample.id} has weight {sample.weight:g}: give {HEAVIEST:g} at most")
    try:
        if sample.messages is None:
            ids = [*tokenizer.encode_exactly(sample.text or "").tolist(), tokenizer.end_id]
            learn = [bool(sample.text)] * len(ids)
        else:
            ids, learn = tokenizer.apply_chat(sample.messages, exact=True)
    except TextError as error:
        raise error.within(f"sample {sample.id}") from error
    return ids, np.asarray(learn, np.float32) * sample.weight


def _texts(sample: Sample) -> list[str]:
    return [sample.text or ""] if sample.messages is None else [message["content"] for message in sample.messages]
