"""Whether reading batches could ever hold training up: tokens/s of the loader alone against those of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from elara.bench.measure import Figure, Run, figure, race
from elara.data.config import DataConfig
from elara.data.module import ElaraData
from elara.data.preparation import Prepared
from elara.data.tokens import TokenFile, TokenWriter, token_dtype
from elara.tokenizer import TokenizerConfig
from elara.tokenizer.byte import ByteTokenizer

TOKENS = 1 << 25  # in the file: 64 MB, more than a CPU's caches hold
BATCHES = 200  # read at a time
SHAPES = {  # vocabulary, windows, tokens of each
    "characters, 12 x 64": (128, 12, 64),
    "characters, 8 x 256": (128, 8, 256),
    "GPT-2, 8 x 1024": (50304, 8, 1024),
}


def loading(what: str, step: Run, tokens: int, device: torch.device, rounds: int) -> Iterator[Figure]:
    """Time that `step` takes to train on `tokens` tokens, over the time the loader takes to bring them to `device`.

    The token file is mapped and shuffled over as in training; with a GPU batches go through pinned memory.
    """
    with TemporaryDirectory() as folder:
        for name, (vocabulary, batch, seq) in SHAPES.items():
            prepared = _written(Path(folder) / name, vocabulary)
            for workers in (0, 2):
                reader = _Reader(prepared, batch, seq, workers, device)
                seconds = race({"loader": reader.read, "training": step}, rounds)
                reader.close()
                read = BATCHES * batch * seq
                found = figure(
                    f"loader / training tokens/s: {name}, {workers} workers",
                    [s * tokens / read for s in seconds["loader"]],
                    seconds["training"],
                    target=10,
                    faster=True,
                    note=f"training: {what}, {tokens / min(seconds['training']):,.0f} tokens/s",
                )
                found.tokens_per_second = tokens / found.subject
                yield found


class _Given(ElaraData):
    """The data module over token files that are there already."""

    def __init__(self, given: Prepared, data: DataConfig, seq: int) -> None:
        super().__init__(data, TokenizerConfig(), given.folder, seed=0, seq=seq)
        self.given = given

    @property
    def prepared(self) -> Prepared:
        return self.given


class _Reader:
    """Reads on through the epochs, `BATCHES` at a time; workers, if any, stay."""

    def __init__(self, prepared: Prepared, batch: int, seq: int, workers: int, device: torch.device) -> None:
        data = _Given(prepared, DataConfig(batch_size=batch, workers=workers), seq)
        self.batches, self.device = iter(data.train_dataloader()), device

    def read(self) -> None:
        for _ in range(BATCHES):
            next(self.batches).tokens.to(self.device, non_blocking=True)

    def close(self) -> None:
        if hasattr(self.batches, "_shutdown_workers"):
            self.batches._shutdown_workers()


def _written(folder: Path, vocabulary: int) -> Prepared:
    folder.mkdir()
    dtype = token_dtype(vocabulary)
    with TokenWriter(folder, "train", dtype) as writer:
        writer.write(np.random.default_rng(0).integers(vocabulary, size=TOKENS), TOKENS)
        writer.end_document()
    manifest = {"dtype": dtype.str, "train": writer.counts}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    train = TokenFile(folder, "train")
    return Prepared(folder, ByteTokenizer(), train, train, manifest)
