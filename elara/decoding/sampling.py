"""From logits to tokens: the distribution that a sampling config describes, and draws from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elara.config import SamplingConfig


def likeliest(logits: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The most likely allowed token at each place of logits (..., vocab), and its logit: nan or infinite where the
    allowed ones are no numbers."""
    best = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).max(-1)
    return best.indices, best.values


def marked(ids: Tensor, logits: Tensor, vocab: int) -> Tensor:
    """Ids with `vocab`, which is no token, in place of those whose logit is no finite number.

    So the host, which waits for the ids anyway, need not wait for a second answer; `draw` marks what it draws alike.
    """
    return ids.masked_fill(logits.mul(0).isnan(), vocab)


def probabilities(logits: Tensor, sampling: SamplingConfig, allowed: Tensor | None = None) -> Tensor:
    """The distribution to sample from: allowed tokens, temperature, top-k, then top-p; float32 or wider.

    logits: (..., vocab). allowed: boolean (vocab), tokens that may be drawn, or None. Temperature 0 puts everything on
    the most likely token, so greedy decoding is sampling from this distribution too. All are nan where an allowed logit
    is nan or infinite.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if sampling.temperature < torch.finfo(logits.dtype).tiny:  # 0, or as good as that: divided by, it would give nan
        ids, best = likeliest(logits)
        return F.one_hot(ids, logits.shape[-1]).to(logits.dtype) + best.mul(0)[..., None]
    # the maximum is taken off first: a tiny temperature then overflows to -inf, never to nan
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # probability of all tokens that rank higher
        ranked = ranked.masked_fill(before >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution. probs: (..., vocab), not all 0; uniform: (...) in [0, 1). Returns ids (...).

    A token of probability 0 is never drawn, whatever the rounding; from probabilities that are nan comes `vocab`, which
    is no token.
    """
    cumulative = probs.cumsum(-1)
    total = cumulative[..., -1:]
    target = uniform[..., None].to(total) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[..., 0]


class Uniforms:
    """One stream of uniform numbers per row, so that a row's text does not depend on the rows beside it."""

    def __init__(self, seed: int, rows: int, device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
        self.device = device

    def draw(self, count: int) -> Tensor:
        """The next `count` numbers of every row, (rows, count) in [0, 1)."""
        rows = [torch.rand(count, generator=generator) for generator in self.generators]
        return torch.stack(rows).to(self.device)
