"""A decoding step of fixed shape, which a CUDA graph can replay without the host: batch 1, greedy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elara.config import ElaraConfig
from elara.model import ElaraLM, KVCache
from elara.model.attention import View, rope_angles


class FixedCache(KVCache):
    """A cache of one row whose fill is a tensor: every step reads its whole capacity, what is empty is masked."""

    def __init__(self, config: ElaraConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, 1, capacity, dtype=dtype, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values, (1, n_kv_head, 1, head_dim), at `place`; returns the whole layer."""
        self.k[layer].index_copy_(2, self.place, k.to(self.k.dtype))
        self.v[layer].index_copy_(2, self.place, v.to(self.v.dtype))
        return self.k[layer], self.v[layer]


class DecodeGraph:
    """Writes `new_tokens` behind a prompt, again with every `write()`; with `capture` as one replayed CUDA graph."""

    def __init__(self, model: ElaraLM, prompt: list[int], new_tokens: int, *, capture: bool) -> None:
        weight = model.embed.weight
        self.model, self.prompt, self.new_tokens = model.eval(), prompt, new_tokens
        self.cache = FixedCache(model.config, len(prompt) + new_tokens, weight.dtype, weight.device)
        self.index = torch.arange(self.cache.capacity, device=weight.device)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            self._capture()

    @torch.no_grad()
    def write(self) -> list[int]:
        """Token ids behind the prompt; the prompt itself is read token by token on the first call only."""
        if not self.cache.lengths[0]:
            for place, token in enumerate(self.prompt):
                self.token.fill_(token)
                self.cache.place.fill_(place)
                self._step()
            self.cache.lengths = [len(self.prompt)]
            self.first = self.token.clone()
        self.token.copy_(self.first)
        self.cache.place.fill_(len(self.prompt))
        written = [self.token.clone()]
        for _ in range(self.new_tokens - 1):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step()
            written.append(self.token.clone())
        return torch.cat(written).flatten().tolist()

    def _step(self) -> None:
        """Read `token` at `place`; put the next token and place there."""
        config, place = self.model.config, self.cache.place
        cos, sin = rope_angles(place[None], config.head_dim, config.model.rope_base)
        visible = (self.index <= place)[None, None, None]
        view = View(1, cos, sin, visible, False, [], self.cache, None)
        x = self.model.embed(self.token)
        for block, layers in self._order():
            x, _ = block(x, view, layers)
        self.token.copy_(self.model.ar_head(self.model.norm(x)).argmax(-1))
        place.add_(1)

    def _order(self) -> Iterator[tuple[nn.Module, list[tuple[int, int]]]]:
        """Blocks with the (recursion pass, effective layer) pairs that they are applied for."""
        depth, count = self.model.config.trm.depth, len(self.model.blocks)
        if self.model.config.trm.order == "block":
            for i, block in enumerate(self.model.blocks):
                yield block, [(p, i * depth + p) for p in range(depth)]
        else:
            for p in range(depth):
                for i, block in enumerate(self.model.blocks):
                    yield block, [(p, p * count + i)]

    @torch.no_grad()
    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what allocates or compiles does so before the recording
            for _ in range(3):
                self.cache.place.zero_()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.cache.place.zero_()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
