"""Which tokens make which batch: a pure function of (seed, epoch, step), so that a run can go on anywhere exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from elara.data.opinions import OpinionFile, StoredOpinion
from elara.data.tokens import TokenFile
from elara.errors import ElaraError

PADDING = -1  # stands behind a document's last token where a window is longer: no id, no target

Int64 = NDArray[np.int64]
Table = tuple[Int64, Int64]  # starts and lengths of windows


class Batch(NamedTuple):
    """Windows of a corpus.

    tokens: int64 (batch, seq + 1), `PADDING` where a window is shorter. weights: float32 (batch, seq + 1), what each
    token counts as a target, 0 = it is read only; None = 1 for all. opinions: of each teacher, behind the first seq.
    """

    tokens: Tensor
    weights: Tensor | None = None
    opinions: tuple[StoredOpinion, ...] = ()


class FirstBatch(NamedTuple):
    """A `Batch` that begins an optimizer step of several. ahead: the others of that step, without opinions."""

    tokens: Tensor
    weights: Tensor | None
    opinions: tuple[StoredOpinion, ...]
    ahead: tuple[Batch, ...]


class Consumed(NamedTuple):
    """How far training has read a corpus, all ranks together: `windows` windows of epoch number `epoch` (from 0).

    It says nothing about batches, so that a run may go on with batches of another size, on another number of ranks.
    """

    epoch: int
    windows: int


NOTHING = Consumed(epoch=0, windows=0)


class Batches(Dataset[Batch]):
    """Training batches. An item is a whole batch; item 0 is the first one after `start`.

    The packed stream is cut into windows that share one token (the last target is the next input), from an offset that
    is drawn per epoch; an epoch visits every window once, in an order drawn per epoch, and drops the last incomplete
    batch. With a `table` the windows are the table's; where they are shorter than seq + 1, the rest is `PADDING`.

    Args:
        tokens: the split to read.
        batch_size: windows per item.
        seq: inputs per window; a window has seq + 1 tokens.
        seed: of offset and order.
        rank, world: of every `world` batches in a row, this rank has number `rank`.
        table: `document_windows` or `packed_windows`; None = the stream.
        opinions: what teachers said of this split.
        start: what has been read before the first item.

    Raises:
        ElaraError: the corpus is too small for one batch per rank.
    """

    def __init__(
        self, tokens: TokenFile, batch_size: int, seq: int, seed: int,
        *, rank: int = 0, world: int = 1, table: Table | None = None, opinions: Sequence[OpinionFile] = (),
        start: Consumed = NOTHING,
    ) -> None:
        self.tokens, self.batch_size, self.seq, self.seed = tokens, batch_size, seq, seed
        self.rank, self.world, self.start = rank, world, start
        self._table, self._opinions = table, tuple(opinions)
        self.windows = max(len(tokens) - seq, 0) // seq if self._table is None else len(self._table[0])
        self.steps = self.windows // (batch_size * world)
        if not self.steps:
            raise ElaraError(
                f"the corpus has {len(tokens)} tokens, {self.windows} windows of {seq}: too few for a batch of "
                f"{batch_size * world}; lower data.batch_size or data.seq, or give more text"
            )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        """Steps per epoch."""
        return self.steps

    def __getitem__(self, position: int) -> Batch:
        epoch, read = self.consumed(position)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.windows, self.seed, epoch)
        first = read + self.rank * self.batch_size
        chosen = self._order[first : first + self.batch_size]
        if self._table is not None:
            at = places(self._table[0][chosen], self._table[1][chosen], self.seq)
            return _read(self.tokens, at, self._opinions)
        starts = chosen * self.seq + epoch_offset(self.seq, self.seed, epoch)
        return _read(self.tokens, starts[:, None] + np.arange(self.seq + 1), self._opinions)

    def consumed(self, items: int) -> Consumed:
        """What has been read when every rank has read so many items; the next item begins there."""
        per_step = self.batch_size * self.world
        left = max(0, self.windows - self.start.windows) // per_step  # steps in the epoch that `start` lies in
        if items < left:
            return Consumed(self.start.epoch, self.start.windows + items * per_step)

        more, step = divmod(items - left, self.steps)
        return Consumed(self.start.epoch + 1 + more, step * per_step)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": -1, "_order": np.empty(0, np.int64)}  # workers compute the order themselves


class Mixture(Dataset[Batch]):
    """Batches whose rows come from several corpora: those of the first, then those of the next.

    An item holds the same item of every part, so it is as theirs a function of (seed, start, position); each part has
    epochs of its own.
    """

    def __init__(self, parts: Sequence[Batches]) -> None:
        self.parts = tuple(parts)

    def __len__(self) -> int:
        """Steps per epoch of the first part."""
        return len(self.parts[0])

    def __getitem__(self, position: int) -> Batch:
        every = [part[position] for part in self.parts]
        weights = None
        if any(batch.weights is not None for batch in every):
            weights = torch.cat([(b.tokens != PADDING).float() if b.weights is None else b.weights for b in every])
        said = zip(*(batch.opinions for batch in every), strict=True)  # of each teacher, in all parts
        opinions = tuple(StoredOpinion(*map(torch.cat, zip(*parts, strict=True))) for parts in said)
        return Batch(torch.cat([batch.tokens for batch in every]), weights, opinions)


class Order(Sampler[int]):
    """Positions 0, 1, 2 ... without end: epochs follow each other inside, so training sees one endless pass.

    Positions, not steps, reach the workers: a persistent worker needs no word about the epoch. There is no length,
    which makes Lightning count steps only; accumulation and validation run across epochs.
    """

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Steps:
    """A loader's batches; the first of every optimizer step is a `FirstBatch` and brings the others along.

    The loss of a step is a mean over all its targets: their number must be known before the first backward pass.

    Args:
        loader: batches without end.
        size: batches of an optimizer step.
    """

    def __init__(self, loader: Iterable[Batch], size: int) -> None:
        self.loader, self.size = loader, size

    def __iter__(self) -> Iterator[Batch | FirstBatch]:
        batches = iter(self.loader)
        while step := list(itertools.islice(batches, self.size)):
            yield FirstBatch(*step[0], tuple(batch._replace(opinions=()) for batch in step[1:]))
            yield from step[1:]


class ValidationBatches(Dataset[Batch]):
    """Fixed windows of the held-out documents, each within one document.

    Every token but each document's first is a target exactly once; behind a document's end stands `PADDING`, and so do
    whole windows of it behind the last one, where a batch or a rank would have fewer than the others.

    Args:
        limit: at most so many batches, of windows spread evenly over the text; None = all windows.
        rank, world: item `i` of this rank is batch `i * world + rank`.
    """

    def __init__(
        self, tokens: TokenFile, batch_size: int, seq: int, *, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.tokens, self.batch_size, self.seq = tokens, batch_size, seq
        starts, lengths = document_windows(tokens.ends, seq)
        count = len(starts) if limit is None else min(len(starts), limit * batch_size * world)
        if not count:
            raise ElaraError(f"the validation text has {len(tokens)} tokens, too few for a window: give more text")
        chosen = np.arange(count, dtype=np.int64) * len(starts) // count
        missing = np.zeros(-count % (batch_size * world), np.int64)
        shape = (-1, world, batch_size)
        self._starts = np.append(starts[chosen], missing).reshape(shape)[:, rank]  # (batches, batch_size)
        self._lengths = np.append(lengths[chosen], missing).reshape(shape)[:, rank]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return _read(self.tokens, places(self._starts[index], self._lengths[index], self.seq))


def document_windows(ends: Int64, seq: int) -> Table:
    """Starts and lengths (2..seq + 1) of the windows that cover each document, stride seq."""
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    counts = np.maximum(ends - begins - 1 + seq - 1, 0) // seq  # ceil(targets / seq)
    counts[ends - begins < 2] = 0
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + (np.arange(counts.sum(), dtype=np.int64) - first) * seq
    return starts, np.minimum(seq + 1, np.repeat(ends, counts) - starts)


def packed_windows(ends: Int64, seq: int) -> Table:
    """Windows that begin with a document and hold as many of the following ones, whole, as fit into seq + 1 tokens.

    A longer document fills windows of its own, as in `document_windows`.
    """
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    long = document_windows(ends, seq)
    windows, first = list[tuple[int, int]](), 0
    while first < len(ends):
        last = int(np.searchsorted(ends, begins[first] + seq + 1, side="right"))  # the first one that does not fit
        if last > first:
            windows.append((int(begins[first]), int(ends[last - 1] - begins[first])))
        else:
            inside = slice(*np.searchsorted(long[0], [begins[first], ends[first]]))
            windows += zip(long[0][inside].tolist(), long[1][inside].tolist(), strict=True)
            last = first + 1
        first = last
    table = np.array([window for window in windows if window[1] > 1], np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def permutation(n: int, seed: int, epoch: int) -> Int64:
    """A random order of 0..n-1: indices sorted by their hashes, the same in every version of every library."""
    return np.argsort(_mix(np.arange(n, dtype=np.uint64) ^ _key(seed, epoch, 0)), kind="stable")


def epoch_offset(seq: int, seed: int, epoch: int) -> int:
    """Where the first window of an epoch starts: 0..seq-1."""
    return int(_key(seed, epoch, 1)[0] % np.uint64(seq))


def _key(seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    key = _mix(np.array([seed % (1 << 64)], np.uint64))
    return _mix(_mix(key ^ np.uint64(epoch)) ^ np.uint64(purpose))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that looks random."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def places(starts: Int64, lengths: Int64, seq: int) -> Int64:
    """Where the tokens of windows lie in the stream, (windows, seq + 1); -1 behind a window's length."""
    columns = np.arange(seq + 1, dtype=np.int64)
    return np.where(columns < lengths[:, None], starts[:, None] + columns, -1)


def _read(tokens: TokenFile, at: Int64, opinions: Sequence[OpinionFile] = ()) -> Batch:
    inside = at >= 0
    rows = np.where(inside, tokens.tokens[at].astype(np.int64), PADDING)
    weights = None if tokens.weights is None else np.where(inside, tokens.weights[at].astype(np.float32), 0)
    said = tuple(file.read(at[:, :-1]) for file in opinions)
    return Batch(torch.from_numpy(rows), None if weights is None else torch.from_numpy(weights), said)
