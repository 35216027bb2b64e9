"""The data's configuration: Hydra schema of the group `data`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class MixConfig:
    """How often each sample of a kind is in the training part: 2.5 = twice, and half of them a third time."""

    document: float = 1.0  # texts
    feedback: float = 1.0  # rated answers
    teacher: float = 1.0  # answers of teachers, and conversations of other kinds


@dataclass
class RagConfig:
    """Passages of the documents before the questions."""

    k: int = 0  # passages per question; 0 = none
    dropout: float = 0.25  # share of the conversations that stay without
    passage: int = 200  # characters per passage, at most


@dataclass
class HoneycombConfig:
    """What is made of memory."""

    min_rating: float = 0.5  # feedback rated lower is left out
    mix: MixConfig = field(default_factory=MixConfig)
    rag: RagConfig = field(default_factory=RagConfig)


@dataclass
class CorpusConfig:
    """Which corpus, and how it is split."""

    name: str = "shakespeare_char"  # begins the name of the prepared folder
    source: str = "shakespeare"  # shakespeare | text | hub | parquet | jsonl | chat | tool_use | honeycomb
    path: str | None = None  # text, parquet, jsonl, chat, honeycomb: file or folder; hub: null, or local parquet files
    url: str | None = None  # shakespeare: another place (address or path) for the same archive
    dataset: str | None = None  # hub: name of the dataset
    subset: str | None = None  # hub: configuration of the dataset, where it has several
    revision: str | None = None  # hub: commit or branch; null = the default branch
    split: str = "train"  # hub: split to read; validation is held out of it by document
    text_field: str = "text"  # hub, parquet, jsonl: column that holds the text
    max_documents: int | None = None  # hub, parquet, jsonl: read only so many; null = all
    val_fraction: float = 0.1  # share held out for validation (shakespeare: fixed plays)
    samples: int = 40000  # tool_use: conversations that are made
    samples_seed: int = 1  # tool_use: another one makes others
    families: list[str] = field(  # tool_use: kinds of questions, in equal shares
        default_factory=lambda: ["arithmetic", "dates", "units", "lookups", "talk"]
    )
    honeycomb: HoneycombConfig = field(default_factory=HoneycombConfig)  # honeycomb: ratings, kinds, passages
    processes: int | None = None  # hub, parquet, jsonl: processes that tokenise; null = all cores for large data


@dataclass
class ReplayConfig(CorpusConfig):
    """Another corpus that takes a part of every batch, so that what was learned of it is not forgotten."""

    name: str = "replay"
    share: float = 0.0  # of each batch's rows, rounded to whole rows; 0 = no replay
    cross_documents: bool = True  # as in DataConfig
    pack: bool = False  # as in DataConfig


@dataclass
class DataConfig(CorpusConfig):
    """Which corpus, how it is split, how batches are cut from it."""

    batch_size: int = 32  # windows per step and rank
    seq: int | None = None  # window length in tokens; null = model.context_length
    cross_documents: bool = True  # false: a window ends with its document, the rest is padding
    pack: bool = False  # with cross_documents=false: a window holds as many whole documents as fit
    val_batches: int | None = None  # validation batches, spread evenly over the text; null = all of it
    replay: ReplayConfig = field(default_factory=ReplayConfig)  # validation stays on the corpus itself
    changed: str = "refuse"  # refuse | accept: resuming a run whose text, or its order, is not what it was
    workers: int = 0  # processes that read batches; 0 = in the training process, the fastest for small batches
