"""Beginnings that many prompts share, read once: a persona, the examples of a few-shot task."""

from __future__ import annotations

from collections import OrderedDict

import torch

from elara.errors import ElaraError
from elara.model import ElaraLM, KVCache


class Prefixes:
    """Keys and values of prompt beginnings; a prompt starts from the longest stretch it shares with one of them.

    limit: how many are kept; the one that was used longest ago goes first.
    """

    def __init__(self, model: ElaraLM, *, limit: int = 8, depth: int | None = None) -> None:
        if limit < 1:
            raise ElaraError(f"limit={limit} must be at least 1: how many prefixes are kept")
        self.model, self.limit, self.depth = model, limit, depth
        self._kept: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @torch.inference_mode()
    def remember(self, tokens: list[int]) -> None:
        """Read a beginning into a cache of its own, once; at most context_length tokens."""
        context = self.model.config.model.context_length
        if not 1 <= len(tokens) <= context:
            raise ElaraError(f"a prefix has {len(tokens)} tokens: give 1 to {context}, the model's context")
        key = tuple(tokens)
        if key not in self._kept:
            weight = self.model.embed.weight
            cache = KVCache(
                self.model.config, 1, len(tokens), depth=self.depth, dtype=weight.dtype, device=weight.device
            )
            have = self.fill(cache, 0, tokens)
            cache.lengths = [have]
            if have < len(tokens):
                self.model(torch.tensor([tokens[have:]], device=weight.device), cache=cache)
            self._kept[key] = cache
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)

    def fill(self, window: KVCache, row: int, tokens: list[int]) -> int:
        """Copy what `tokens` share with a stored beginning into a row of `window`; returns how many tokens that is."""
        best, count = None, 0
        for key in self._kept:
            shared = _shared(key, tokens)
            if shared > count:
                best, count = key, shared
        if best is None:
            return 0
        self._kept.move_to_end(best)
        source = self._kept[best]
        if source.depth != window.depth:
            raise ElaraError(f"the prefixes were read at depth {source.depth}, this text is at depth {window.depth}")
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
