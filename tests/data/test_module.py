"""The data module: the same batches with any number of workers, from any position."""

import itertools

import pytest
import torch

from elara.data import DataConfig
from elara.data.batches import PADDING
from elara.data.module import ElaraData
from elara.tokenizer import TokenizerConfig


@pytest.fixture
def make(tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("".join(f"line {i}: the quick brown fox\n" for i in range(400)))

    def build(**options):
        data = DataConfig(**{"name": "text", "source": "text", "path": str(file), "batch_size": 4, **options})
        return ElaraData(data, TokenizerConfig("byte"), tmp_path / "data", seed=1, seq=32)

    return build


def take(module, count):
    return [batch.tokens for batch in itertools.islice(module.train_dataloader(), count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_anywhere_equals_the_uninterrupted_order(make, workers):
    steps = len(make().train_batches())
    whole = take(make(workers=workers), 2 * steps + 5)
    assert whole[0].shape == (4, 33)
    for position in (1, steps - 1, steps, steps + 3):
        module = make(workers=workers)
        module.start = make().consumed(position)
        rest = take(module, 6)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[position:], strict=False))


def test_workers_change_nothing(make):
    pairs = zip(take(make(workers=0), 30), take(make(workers=2), 30), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_every_token_of_an_epoch_comes_once(make):
    module = make()
    steps = len(module.train_batches())
    first = torch.cat(take(module, steps))
    offsets = module.prepared.train.tokens
    assert len({tuple(row) for row in first.tolist()}) == len(first)
    assert (first >= 0).all()
    assert first[:, 1:].numel() > 0.9 * len(offsets)


def test_validation_is_the_held_out_tenth(make):
    module = make()
    module.setup("fit")
    rows = torch.cat([batch.tokens for batch in module.val_dataloader()])
    tokens = rows[:, 1:][rows[:, 1:] != PADDING]
    text = (make().prepared.folder.parent.parent.parent / "my.txt").read_text()
    assert module.prepared.tokenizer.decode(tokens.tolist()) == text[int(len(text) * 0.9) + 1 :]
    assert len(list(make(val_batches=2).val_dataloader())) == 2


def test_seq_overrides_the_context_length(make):
    assert take(make(seq=8), 1)[0].shape == (4, 9)
