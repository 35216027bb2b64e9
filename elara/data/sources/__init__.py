"""Where text comes from: Shakespeare, the user's own files, tables of documents, conversations, memory."""

from pathlib import Path

from elara.data.config import CorpusConfig
from elara.data.sources.base import SPLITS, Counts, DocumentSource, Source, Split
from elara.data.sources.honeycomb import Honeycomb
from elara.data.sources.samples import open_samples
from elara.data.sources.shakespeare import Shakespeare
from elara.data.sources.table import open_table
from elara.data.sources.text import open_text
from elara.errors import ElaraError

__all__ = ["CONVERSATIONS", "SPLITS", "Counts", "DocumentSource", "Source", "Split", "open_source"]

KINDS = ("shakespeare", "text", "hub", "parquet", "jsonl", "chat", "tool_use", "honeycomb")
CONVERSATIONS = ("chat", "tool_use", "honeycomb")  # of which the assistant's words are learned


def open_source(data: CorpusConfig, root: Path) -> Source:
    """The source that `data.source` names; ElaraError when its settings are incomplete.

    root: folder of downloads and prepared data.
    """
    if data.source == "shakespeare":
        return Shakespeare(root / "archives", data.url)
    if data.source == "text":
        return open_text(data.path, data.val_fraction, root)
    if data.source in ("hub", "parquet", "jsonl"):
        return open_table(data, root)
    if data.source == "honeycomb":
        if data.path is None:
            raise ElaraError("data=honeycomb needs data.path=<a folder or file of samples>, as memory is exported")
        return Honeycomb(data.path, data.val_fraction, data.honeycomb, root)
    if data.source in CONVERSATIONS:
        return open_samples(data, root)
    raise ElaraError(f"data.source={data.source} is unknown: use {', '.join(KINDS)}")
