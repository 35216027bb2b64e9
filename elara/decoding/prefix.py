"""Beginnings that many prompts share, read once: a persona, the examples of a few-shot task."""

from __future__ import annotations

from collections import OrderedDict
from threading import RLock

import torch

from elara.decoding.inference import PREFILL, cache_dtype, inference
from elara.errors import ElaraError
from elara.model import ElaraLM, KVCache


class Prefixes:
    """Keys and values of prompt beginnings; a prompt starts from the longest stretch it shares with one of them.

    limit: how many are kept; the one that was used longest ago goes first.
    """

    def __init__(self, model: ElaraLM, *, limit: int = 8, depth: int | None = None) -> None:
        if limit < 1:
            raise ElaraError(f"limit={limit} must be at least 1: how many prefixes are kept")
        self.model, self.limit, self.depth = model, limit, depth or model.config.trm.depth
        self._kept: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()
        self._lock = RLock()  # a server's worker reads while its callers remember

    def __len__(self) -> int:
        return len(self._kept)

    def check(self, model: ElaraLM, depth: int | None) -> None:
        """Raise ElaraError unless the beginnings were read by this model at this recursion depth."""
        wanted = depth or model.config.trm.depth
        if model is not self.model:
            raise ElaraError("the prefixes were read by another model: remember them with the one that writes")
        if wanted != self.depth:
            raise ElaraError(f"the prefixes were read at depth {self.depth}, this text is at depth {wanted}")

    def remember(self, tokens: list[int]) -> None:
        """Read a beginning into a cache of its own, once; 1 to context_length tokens, else ElaraError."""
        context, vocab = self.model.config.model.context_length, self.model.config.vocab_size
        if not 1 <= len(tokens) <= context:
            raise ElaraError(f"a prefix has {len(tokens)} tokens: give 1 to {context}, the model's context")
        if bad := [token for token in tokens if not 0 <= token < vocab]:
            raise ElaraError(f"a prefix has token id {bad[0]}, outside the model's vocabulary of {vocab}")
        key = tuple(tokens)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._read(tokens)
                while len(self._kept) > self.limit:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)

    def _read(self, tokens: list[int]) -> KVCache:
        weight = self.model.embed.weight
        dtype, device = cache_dtype(weight), weight.device
        cache = KVCache(self.model.config, 1, len(tokens), depth=self.depth, dtype=dtype, device=device)
        with inference(self.model):
            have = self.fill(cache, 0, tokens)
            cache.lengths = [have]
            for part in torch.tensor([tokens[have:]], device=device).split(PREFILL, 1) if have < len(tokens) else []:
                self.model(part, cache=cache)
        return cache

    def fill(self, window: KVCache, row: int, tokens: list[int]) -> int:
        """Copy what `tokens` share with a stored beginning into a row of `window`; returns how many tokens that is."""
        with self._lock:
            shared = {key: _shared(key, tokens) for key in self._kept}
            best = max(shared, key=lambda key: shared[key], default=())
            count = shared.get(best, 0)
            if not count:
                return 0
            self._kept.move_to_end(best)
            source = self._kept[best]
        window.k[:, row, :, :count] = source.k[:, 0, :, :count]
        window.v[:, row, :, :count] = source.v[:, 0, :, :count]
        return count


def _shared(one: tuple[int, ...], other: list[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
