"""Samples: the one schema of conversations and texts that are kept, collected from teachers, or exported from memory.

On disk they are JSON lines or Parquet with the same columns. JSON lines:

    {"id": "...", "messages": [{"role": "user", "content": "..."}, ...], "source": "...", "weight": 1.0,
     "provenance": {...}}

with `text` in place of `messages` for plain documents; the rest may be left out. In Parquet `provenance` is a JSON
string. Messages may be in OpenAI's form (content in parts of text, `tool_calls`) or in ShareGPT's (`conversations`):
`elara.data.messages`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elara.data.files import Found, walk
from elara.data.hashes import digest
from elara.data.messages import SHAREGPT, from_sharegpt, plain
from elara.data.rows import PARQUET, json_values, parquet_rows, pyarrow
from elara.errors import ElaraError
from elara.tokenizer import ROLES

Message = dict[str, str]  # role and content

SUFFIXES = (".jsonl", PARQUET)
KEPT = "kept.jsonl"  # of a store of elara.collect: the samples beside it are the same ones and those that were rejected
COLUMNS = ("id", "messages", "text", "source", "weight", "provenance")


@dataclass(frozen=True)
class Sample:
    """A conversation (`messages`) or a document (`text`), one of the two.

    id: unique within its folder. source: the kind of thing it is: document, feedback, teacher, tool_use, ... weight:
    how much it counts in training, 1 = as any other. provenance: JSON values about where it comes from. unread: keys of
    the row it was read from, and of its messages, whose words are in none of these.

    Raises:
        ElaraError: neither or both of messages and text, an unknown role, a weight that is no number of at least 0.
    """

    id: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    source: str = "document"
    weight: float = 1.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ElaraError(f"sample {self.id} needs either messages or text")
        if not 0 <= self.weight < float("inf"):
            raise ElaraError(f"sample {self.id} has weight {self.weight}: give a number of at least 0")
        if not isinstance(self.provenance, Mapping):
            raise ElaraError(f"sample {self.id} has a provenance that is no JSON object")
        for message in self.messages or ():
            role = message.get("role")
            if role not in ROLES:
                raise ElaraError(f"sample {self.id} has a message of role {role!r}: roles are {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str):
                raise ElaraError(f"sample {self.id} has a message of role {role} whose content is no text")

    def row(self) -> dict[str, Any]:
        """As a JSON object; what is empty is left out."""
        row: dict[str, Any] = {"id": self.id}
        row |= {"text": self.text} if self.messages is None else {"messages": [dict(m) for m in self.messages]}
        return row | {"source": self.source, "weight": self.weight, "provenance": dict(self.provenance)}

    @classmethod
    def of(cls, row: Any, where: str) -> Sample:
        """From a JSON object; `where` names the place for errors. Keys that the schema lacks are ignored (`unread`).

        One without an id has a hash of what it says as its id.
        """
        if not isinstance(row, Mapping) or not row.keys() & {"messages", "text", *SHAREGPT}:
            raise ElaraError(f"{where} is not a sample: a JSON object with messages, conversations or text is needed")
        text, provenance = row.get("text"), row.get("provenance")
        others = {key: value for key, value in row.items() if key not in (*COLUMNS, *SHAREGPT)}
        unread = [key for key, value in others.items() if value and isinstance(value, list | Mapping)]
        try:
            messages = row["messages"] if row.get("messages") is not None else from_sharegpt(row)
            read = None if messages is None else [plain(message) for message in messages]
            return cls(
                id=_id(row.get("id"), [messages, text]),
                messages=None if read is None else tuple(message for message, _ in read),
                text=text,
                source=str(row.get("source") or "document"),
                weight=_weight(row.get("weight")),
                provenance=json.loads(provenance) if isinstance(provenance, str) else provenance or {},
                unread=tuple(dict.fromkeys([*unread, *(key for _, keys in read or () for key in keys)])),
            )
        except (TypeError, ValueError, ElaraError) as error:
            raise ElaraError(f"{where}: {error}") from error


def _id(given: Any, content: Any) -> str:
    if given is None:
        return digest(content)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise ElaraError(f"an id is {type(given).__name__}: give a text or a number, or leave it out")
    return str(given)


def _weight(given: Any) -> float:
    try:
        return 1.0 if given is None else float(given)
    except (TypeError, ValueError) as error:
        raise ElaraError(f"weight {given!r} is no number") from error


def prompt_id(messages: Iterable[Message]) -> str:
    """The name of what is asked: a hash of the messages before an answer. Collected answers keep it as
    `provenance["prompt"]`."""
    return digest([[message["role"], message["content"]] for message in messages])


def sample_files(path: Path | str) -> Found:
    """The sample files of a path: itself, or all of a folder, by name; ElaraError if there are none.

    Of a store of elara.collect only what its filters kept is meant.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = walk(place, lambda file: file.suffix in SUFFIXES)
        stores = {file.parent for file in found.files if file.name == KEPT}
        found.files = [file for file in found.files if file.name == KEPT or file.parent not in stores]
        if not found.files:
            raise ElaraError(f"{path} holds no samples: files that end in {' or '.join(SUFFIXES)} are needed")
        return found
    if not place.is_file():
        raise ElaraError(f"{path} does not exist: give a file of samples or a folder of them")
    if place.suffix not in SUFFIXES:
        raise ElaraError(f"{path} is not a file of samples: its name must end in {' or '.join(SUFFIXES)}")
    return Found(place, [place])


def read_samples(path: Path | str) -> Iterator[Sample]:
    """All samples of a file or folder, read only as far as they are asked for; ElaraError names file and line."""
    for file in sample_files(path).files:
        for where, row in parquet_rows(file) if file.suffix == PARQUET else json_values(file):
            yield Sample.of(row, where)


def write_parquet(file: Path, samples: Iterable[Sample], rows: int = 10_000) -> int:
    """Write samples as Parquet, `rows` at a time; returns how many. Needs pyarrow (extra `hub`)."""
    pa, parquet = pyarrow()
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    kinds = (pa.string(), pa.list_(message), pa.string(), pa.string(), pa.float64(), pa.string())
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    count, batch = 0, list[dict[str, Any]]()

    def flush() -> None:
        writer.write_table(pa.Table.from_pylist(batch, schema))
        batch.clear()

    with parquet.ParquetWriter(file, schema) as writer:
        for sample in samples:
            batch.append({**sample.row(), "provenance": json.dumps(dict(sample.provenance))})
            count += 1
            if len(batch) == rows:
                flush()
        if batch:
            flush()
    return count
