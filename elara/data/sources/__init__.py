"""Where text comes from: Shakespeare, the user's own files, tables of documents local or on the hub."""

from pathlib import Path

from elara.data.config import DataConfig
from elara.data.sources.base import SPLITS, Counts, DocumentSource, Source, Split
from elara.data.sources.shakespeare import Shakespeare
from elara.data.sources.text import open_text
from elara.errors import ElaraError

__all__ = ["SPLITS", "Counts", "DocumentSource", "Source", "Split", "open_source"]

KINDS = ("shakespeare", "text", "hub", "parquet", "jsonl")


def open_source(data: DataConfig, cache: Path) -> Source:
    """The source that `data.source` names; ElaraError when its settings are incomplete."""
    if data.source == "shakespeare":
        return Shakespeare(cache, data.url)
    if data.source == "text":
        return open_text(data.path, data.val_fraction)
    raise ElaraError(f"data.source={data.source} is unknown: use {', '.join(KINDS)}")
