"""Which tokens make which batch: purity, no replacement, ranks, documents."""

import itertools
import pickle
import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elara.data.batches import (
    NOTHING,
    PADDING,
    Batches,
    Consumed,
    Order,
    ValidationBatches,
    document_windows,
    packed_windows,
    permutation,
)
from elara.errors import ElaraError


def epoch(batches, number=0):
    steps = len(batches)
    return torch.stack([batches[number * steps + step].tokens for step in range(steps)])


def test_a_batch_is_consecutive_tokens_of_the_stream(token_file):
    batch = Batches(token_file(1000), batch_size=4, seq=16, seed=1)[0].tokens
    assert batch.shape == (4, 17)
    assert batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()


def test_an_epoch_visits_every_window_once(token_file):
    batches = Batches(token_file(1000), batch_size=3, seq=16, seed=1)
    for number in range(4):
        rows = epoch(batches, number).flatten(0, 1)
        starts = rows[:, 0]
        assert len(set(starts.tolist())) == len(starts) == len(batches) * 3
        assert len({int(start) % 16 for start in starts}) == 1  # one grid of windows, so none overlap
        assert batches.windows - len(starts) < 3  # only the incomplete last batch is missing


def test_epochs_differ_in_order_and_offset(token_file):
    batches = Batches(token_file(5000), batch_size=4, seq=32, seed=1)
    first = [epoch(batches, number) for number in range(8)]
    assert len({int(rows[0, 0, 0]) % 32 for rows in first}) > 4
    assert not torch.equal(first[0], first[1])


def test_items_depend_on_nothing_but_seed_epoch_and_step(token_file):
    tokens = token_file(3000)
    ordered = [Batches(tokens, 4, 16, seed=7)[i].tokens for i in range(3 * 46)]  # a fresh object for every item
    used = Batches(tokens, 4, 16, seed=7)
    for position in np.random.default_rng(0).permutation(len(ordered)):
        assert torch.equal(used[int(position)].tokens, ordered[position])
    other = Batches(tokens, 4, 16, seed=8)
    assert any(not torch.equal(other[i].tokens, ordered[i]) for i in range(3))


def test_the_order_is_fixed_for_all_versions(token_file):
    # a run resumed after an update must go on in the same order
    assert permutation(10, seed=1, epoch=0).tolist() == [3, 1, 9, 6, 2, 4, 7, 8, 0, 5]
    assert Batches(token_file(1000), 4, 16, seed=1)[5].tokens[:, 0].tolist() == [867, 227, 579, 147]


@given(st.integers(0, 300), st.integers(-5, 2**70), st.integers(0, 9))
def test_permutation_is_one(n, seed, number):
    assert sorted(permutation(n, seed, number).tolist()) == list(range(n))


def test_permutation_looks_random():
    order = permutation(10000, 1, 0)
    assert abs(np.corrcoef(order, np.arange(10000))[0, 1]) < 0.03
    assert np.bincount(order[:1000] // 1000, minlength=10).std() < 20  # drawn from everywhere


def test_ranks_share_the_single_process_order(token_file):
    tokens = token_file(4000)
    single = Batches(tokens, 2, 16, seed=3)
    ranks = [Batches(tokens, 2, 16, seed=3, rank=rank, world=3) for rank in range(3)]
    assert len(ranks[0]) == len(single) // 3
    for step in range(len(ranks[0])):
        for rank in range(3):
            assert torch.equal(ranks[rank][step].tokens, single[step * 3 + rank].tokens)


def test_pickled_batches_read_the_same(token_file):
    batches = Batches(token_file(1000), 4, 16, seed=1)
    _ = batches[0]
    data = pickle.dumps(batches)
    assert len(data) < 2000  # the tokens and the order stay behind
    assert torch.equal(pickle.loads(data)[17].tokens, batches[17].tokens)


def test_too_small_a_corpus_is_refused_with_the_keys_to_change(token_file):
    with pytest.raises(ElaraError, match=r"data.batch_size or data.seq"):
        Batches(token_file(100), batch_size=8, seq=16, seed=1)
    with pytest.raises(ElaraError):
        Batches(token_file(10), batch_size=1, seq=16, seed=1)


def test_order_goes_on_without_end():
    assert list(itertools.islice(Order(), 3)) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_batches_of_any_sizes_read_every_window_of_an_epoch_once(token_file, seed):
    """Sizes and ranks that change between items; only an epoch's last windows, too few for a batch, are left out."""
    tokens, chance = token_file(1000), random.Random(seed)
    start, epochs = NOTHING, []
    rows: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    while start.epoch < 3:
        size, world = chance.randint(1, 7), chance.randint(1, 3)
        ranks = [Batches(tokens, size, 16, 1, rank=rank, world=world, start=start) for rank in range(world)]
        items = chance.randint(1, 4)
        for item in range(items):
            epochs.append(ranks[0].consumed(item).epoch)
            for batches in ranks:
                rows[epochs[-1]] += [tuple(row) for row in batches[item].tokens.tolist()]
        start = ranks[0].consumed(items)
    assert epochs == sorted(epochs)
    for epoch in range(3):
        order = [tuple(Batches(tokens, 1, 16, 1, start=Consumed(epoch, i))[0].tokens[0].tolist()) for i in range(61)]
        assert rows[epoch] == order[: len(rows[epoch])] and len(order) - len(rows[epoch]) < 21


def check_documents(rows, lengths):
    """Each document's targets come exactly once, and no window crosses a document."""
    ends = np.cumsum(lengths)
    targets = []
    for row in rows.tolist():
        real = [token for token in row if token != PADDING]
        assert row == real + [PADDING] * (len(row) - len(real))
        assert len(real) >= 2
        assert len(set(np.searchsorted(ends, real, side="right"))) == 1
        targets += real[1:]
    firsts = {0, *ends[:-1].tolist()}
    assert sorted(targets) == [token for token in range(ends[-1]) if token not in firsts]


@pytest.mark.parametrize("lengths", [(100,), (1, 5, 17, 33, 1, 16, 2, 64), (2, 2, 2), (40, 1)])
def test_validation_covers_every_document_within_its_bounds(token_file, lengths):
    batches = ValidationBatches(token_file(*lengths), batch_size=3, seq=16)
    assert {len(batches[i].tokens) for i in range(len(batches))} == {3}
    rows = torch.cat([batches[i].tokens for i in range(len(batches))])
    check_documents(rows[rows[:, 0] != PADDING], lengths)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_training_can_keep_within_documents(token_file):
    lengths = (50, 3, 17, 100, 1, 33)
    tokens = token_file(*lengths)
    batches = Batches(tokens, 1, 16, seed=1, table=document_windows(tokens.ends, 16))
    check_documents(epoch(batches).flatten(0, 1), lengths)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 20))
def test_document_windows_against_a_loop(lengths, seq):
    ends = np.cumsum(lengths)
    expected = []
    for end, length in zip(ends, lengths, strict=True):
        inside = range(int(end - length), int(end) - 1, seq)
        expected += [(start, min(seq + 1, int(end) - start)) for start in inside]
    starts, counts = document_windows(ends, seq)
    assert list(zip(starts.tolist(), counts.tolist(), strict=True)) == expected


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 20))
def test_packed_windows_against_a_loop(lengths, seq):
    ends = np.cumsum(lengths)
    expected: list[tuple[int, int]] = []
    room = 0
    for end, length in zip(ends.tolist(), lengths, strict=True):
        if length <= room:  # joins the window that is open
            start, filled = expected.pop()
            expected.append((start, filled + length))
            room -= length
        elif length <= seq + 1:
            expected.append((end - length, length))
            room = seq + 1 - length
        else:
            expected += [(start, min(seq + 1, end - start)) for start in range(end - length, end - 1, seq)]
            room = 0
    starts, counts = packed_windows(ends, seq)
    windows = list(zip(starts.tolist(), counts.tolist(), strict=True))
    assert windows == [window for window in expected if window[1] > 1]


def test_weights_go_with_their_tokens(token_file):
    tokens = token_file(40, 3, 50)
    tokens.weights = (np.arange(93) % 5).astype("<f2")
    for batches in (
        Batches(tokens, 2, 16, seed=1),
        Batches(tokens, 2, 16, seed=1, table=packed_windows(tokens.ends, 16)),
        ValidationBatches(tokens, 2, 16),
    ):
        for i in range(len(batches)):
            rows, weights, _ = batches[i]
            assert weights is not None and weights.dtype == torch.float32
            assert torch.equal(weights, torch.where(rows == PADDING, 0, rows % 5).float())


def test_limited_validation_is_spread_evenly(token_file):
    tokens = token_file(16 * 1000 + 1)
    limited = ValidationBatches(tokens, batch_size=4, seq=16, limit=5)
    assert len(limited) == 5
    starts = torch.cat([limited[i].tokens for i in range(5)])[:, 0]
    assert (starts.diff() == 16 * 50).all()
    assert len(ValidationBatches(tokens, 4, 16, limit=10**6)) == 250


@pytest.mark.parametrize("windows", [7, 8, 9, 12])
def test_validation_ranks_have_equally_many_batches(token_file, windows):
    tokens = token_file(16 * windows + 1)
    ranks = [ValidationBatches(tokens, 2, 16, rank=rank, world=3) for rank in range(3)]
    assert len({len(rank) for rank in ranks}) == 1
    rows = torch.cat([rank[i].tokens for rank in ranks for i in range(len(rank))])
    assert sorted(first for first in rows[:, 0].tolist() if first >= 0) == list(range(0, 16 * windows, 16))


def test_uint32_tokens(token_file):
    tokens = token_file(70000, dtype="<u4")
    batches = Batches(tokens, 2, 64, seed=1)
    assert int(epoch(batches).max()) > 1 << 16
