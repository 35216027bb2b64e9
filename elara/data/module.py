"""The Lightning data module: prepares a corpus and hands out its batches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from elara.data.batches import (
    NOTHING,
    Batch,
    Batches,
    Consumed,
    Mixture,
    Order,
    Steps,
    ValidationBatches,
    document_windows,
    packed_windows,
)
from elara.data.config import DataConfig, ReplayConfig
from elara.data.opinions import OpinionFile
from elara.data.preparation import Prepared, prepare
from elara.data.sources import CONVERSATIONS
from elara.data.tokens import TokenFile
from elara.errors import ElaraError
from elara.tokenizer import TokenizerConfig


class ElaraData(LightningDataModule):
    """Batches of a corpus (`elara.data.batches.Batch`).

    Args:
        root: folder for downloads and prepared data.
        seed: of the order of batches.
        seq: inputs per window, used when `data.seq` is null (the model's context length).

    Attributes:
        start: how far each of `corpora` has been read; () = not at all. Set it before `fit` to resume.
        opinions: what teachers said of the training splits of `corpora`; part of their batches. Set it before `fit`.
    """

    def __init__(self, data: DataConfig, tokenizer: TokenizerConfig, root: Path, *, seed: int, seq: int) -> None:
        super().__init__()
        self.data, self.tokenizer_config, self.root, self.seed = data, tokenizer, Path(root), seed
        self.seq = data.seq or seq
        self.start: Sequence[Consumed] = ()
        self.opinions: Sequence[Sequence[OpinionFile]] = ()
        self._train: Batches | Mixture | None = None  # what the train loader reads

    @cached_property
    def prepared(self) -> Prepared:
        """The token files; opened, or built, on first use."""
        return prepare(self.data, self.tokenizer_config, self.root)

    @cached_property
    def corpora(self) -> list[Prepared]:
        """The data and, where a share of the batches comes from it, data.replay."""
        if not self.data.replay.share:
            return [self.prepared]
        same = TokenizerConfig("saved", path=str(self.prepared.folder / "tokenizer"))
        return [self.prepared, prepare(self.data.replay, same, self.root)]

    @property
    def uneven(self) -> bool:
        """Whether not every token of a training window is a target, so that batches have different numbers of them."""
        replayed = self.data.replay.share > 0
        return not self.data.cross_documents or self.prepared.train.weights is not None or replayed

    @property
    def chat(self) -> bool:
        """Whether a model of this data answers in conversations."""
        return self.data.source in CONVERSATIONS

    def prepare_data(self) -> None:
        """Build the token files; Lightning calls this in one process per machine."""
        prepare(self.data, self.tokenizer_config, self.root)

    def setup(self, stage: str) -> None:
        """Open the token files."""
        _ = self.prepared

    def train_batches(self) -> Batches | Mixture:
        """This rank's training batches."""
        replay, train = self.data.replay, self.prepared.train
        if self.data.pack and not self.data.cross_documents and self._rank()[0] == 0:
            self._note_split(train)
        if not replay.share:
            return self._batches(0, self.data, self.data.batch_size)
        rows = round(replay.share * self.data.batch_size)
        if not 0 < rows < self.data.batch_size:
            raise ElaraError(
                f"data.replay.share={replay.share} of data.batch_size={self.data.batch_size} is {rows} rows: "
                "each corpus needs at least one; change either"
            )
        main = self._batches(0, self.data, self.data.batch_size - rows)
        return Mixture([main, self._batches(1, replay, rows)])

    def _batches(self, corpus: int, cut: DataConfig | ReplayConfig, rows: int) -> Batches:
        """This rank's windows of one of the corpora, so many in every batch."""
        tokens = self.corpora[corpus].train
        rank, world = self._rank()
        table = None
        if not cut.cross_documents:
            table = (packed_windows if cut.pack else document_windows)(tokens.ends, self.seq)
        opinions = self.opinions[corpus] if self.opinions else ()
        start = self.start[corpus] if self.start else NOTHING
        return Batches(
            tokens, rows, self.seq, self.seed, rank=rank, world=world, table=table, opinions=opinions, start=start
        )

    def consumed(self, batches: int) -> list[Consumed]:
        """How far each of `corpora` has been read when every rank has read so many batches after `start`."""
        train = self.train_batches() if self._train is None else self._train
        return [part.consumed(batches) for part in (train.parts if isinstance(train, Mixture) else [train])]

    def train_dataloader(self) -> DataLoader[Batch] | Steps:
        """Batches from `start` on; needs `Trainer(use_distributed_sampler=False)`, ranks are handled here."""
        self._train = self.train_batches()
        loader = self._loader(self._train, Order())
        size = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        return loader if size == 1 else Steps(loader, size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same held-out windows every time."""
        rank, world = self._rank()
        limit = self.data.val_batches
        val = ValidationBatches(self.prepared.val, self.data.batch_size, self.seq, limit=limit, rank=rank, world=world)
        return self._loader(val)

    def _note_split(self, tokens: TokenFile) -> None:
        """Say how many documents no window can hold whole."""
        ends = tokens.ends
        long = int((np.diff(ends, prepend=0) > self.seq + 1).sum())
        if long:
            are = "are longer than a window of {} tokens and are split" if long > 1 else (
                "is longer than a window of {} tokens and is split")
            print(f"note: {long:,} of {len(ends):,} documents {are.format(self.seq)}", file=sys.stderr, flush=True)

    def _loader(self, dataset: Dataset[Batch], sampler: Sampler[int] | None = None) -> DataLoader[Batch]:
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self.data.workers,
            persistent_workers=self.data.workers > 0, pin_memory=torch.cuda.is_available(),
        )

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
