"""Keys and values of the tokens seen so far, one entry per effective layer (block x recursion pass)."""

from __future__ import annotations

import torch
from torch import Tensor

from elara.config import ElaraConfig
from elara.errors import ElaraError


class KVCache:
    """Preallocated cache with rollback; rows may differ in length, come and go.

    k, v: (effective layers, slots, n_kv_head, capacity, head_dim). The first `batch` slots hold rows. `lengths[row]`
    tokens of a row are valid; what lies behind is overwritten by the next append, so dropping rejected drafts is
    `truncate` and costs nothing.
    """

    def __init__(
        self,
        config: ElaraConfig,
        batch: int,
        capacity: int,
        *,
        depth: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        slots: int | None = None,
    ) -> None:
        """batch: empty rows to begin with, of `slots` (default: as many)."""
        self.depth = depth or config.trm.depth
        layers = config.model.n_layer * self.depth
        shape = (layers, slots or batch, config.n_kv_head, capacity, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values, (batch, n_kv_head, new, head_dim), behind each row's valid ones.

        Returns the layer's keys and values up to the longest row. Lengths move only with `advance`, once all layers
        have written. Raises ElaraError when the cache is full.
        """
        new = k.shape[2]
        end = max(self.lengths) + new
        if end > self.capacity:
            raise ElaraError(f"the KV cache holds {self.capacity} tokens and {end} are needed: make it larger")
        keys, values = self.k[layer, : self.batch, :, :end], self.v[layer, : self.batch, :, :end]
        if min(self.lengths) == max(self.lengths):
            keys.narrow(2, end - new, new).copy_(k)
            values.narrow(2, end - new, new).copy_(v)
        else:
            rows = torch.arange(self.batch, device=k.device)[:, None]
            places = torch.tensor(self.lengths, device=k.device)[:, None] + torch.arange(new, device=k.device)
            keys[rows, :, places] = k.transpose(1, 2).to(keys.dtype)  # (batch, new, n_kv_head, head_dim)
            values[rows, :, places] = v.transpose(1, 2).to(values.dtype)
        return keys, values

    def advance(self, new: int) -> None:
        """Count the `new` tokens that every layer has appended as valid."""
        self.lengths = [length + new for length in self.lengths]

    def truncate(self, lengths: list[int]) -> None:
        """Keep the first `lengths[row]` tokens of each row; raises ElaraError if a row is shorter than that."""
        if len(lengths) != self.batch or any(not 0 <= n <= have for n, have in zip(lengths, self.lengths, strict=True)):
            raise ElaraError(f"cannot truncate rows of {self.lengths} tokens to {lengths}")
        self.lengths = list(lengths)

    def like(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for the same model, depth, dtype and device."""
        layers, _, heads, _, dim = self.k.shape
        twin = KVCache.__new__(KVCache)
        twin.depth, twin.lengths = self.depth, [0] * batch
        twin.k = self.k.new_zeros(layers, batch, heads, capacity, dim)
        twin.v = self.v.new_zeros(layers, batch, heads, capacity, dim)
        return twin

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in every row; what is held stays."""
        if capacity > self.capacity:
            wider = self.like(self.slots, capacity)
            wider.k[:, :, :, : self.capacity], wider.v[:, :, :, : self.capacity] = self.k, self.v
            self.k, self.v = wider.k, wider.v

    def extend(self, other: KVCache) -> None:
        """Put the rows of `other` behind the rows here; raises ElaraError when there are not enough slots."""
        first = self.batch
        if first + other.batch > self.slots:
            raise ElaraError(f"the KV cache has {self.slots} rows and {first + other.batch} are needed: make it larger")
        self.lengths += [0] * other.batch
        self.replace(list(range(first, self.batch)), other)

    def drop(self, row: int) -> None:
        """Take a row out; the last one moves into its place."""
        held = self.lengths.pop()
        last = self.batch
        if row != last:
            self.k[:, row, :, :held] = self.k[:, last, :, :held]
            self.v[:, row, :, :held] = self.v[:, last, :, :held]
            self.lengths[row] = held

    def wipe(self, row: int) -> None:
        """Make the whole slot of a row zeros, what lies behind its valid tokens included."""
        self.k[:, row], self.v[:, row] = 0, 0

    def replace(self, rows: list[int], other: KVCache) -> None:
        """Put the rows of `other` in place of these rows."""
        for row, source in zip(rows, range(other.batch), strict=True):
            held = other.lengths[source]
            self.k[:, row, :, :held] = other.k[:, source, :, :held]
            self.v[:, row, :, :held] = other.v[:, source, :, :held]
            self.lengths[row] = held

    def fork(self, prefix: int | None = None, *, batch: int | None = None, capacity: int | None = None) -> KVCache:
        """An independent copy of the first `prefix` tokens (default: all), repeated to `batch` rows if there is one."""
        keep = max(self.lengths) if prefix is None else prefix
        if prefix is not None and prefix > min(self.lengths):
            raise ElaraError(f"cannot fork {prefix} tokens of rows that hold {self.lengths}")
        if batch is not None and self.batch not in (1, batch):
            raise ElaraError(f"cannot fork {self.batch} rows into {batch}")
        twin = self.like(batch or self.batch, capacity or self.capacity)
        twin.k[:, :, :, :keep] = self.k[:, : self.batch, :, :keep]
        twin.v[:, :, :, :keep] = self.v[:, : self.batch, :, :keep]
        lengths = self.lengths if prefix is None else [prefix] * self.batch
        twin.lengths = list(lengths) * (twin.batch // self.batch)
        return twin
