"""TiDAR decoding (arXiv 2511.08923, section 3.2): draft in parallel, verify autoregressively, in the same forward.

A draft of L tokens is [t, d_1 .. d_{L-1}]: t was drawn from the AR head and stands, the d_i were drawn from the
diffusion head and must be verified. One forward reads the draft behind the cache and, for each number j = 1..L of its
tokens that may stand, a group of L masks that sees the cache and the first j of them. The AR head says how many stand,
a, and draws the token behind them; the masks of group a hold the proposals for what follows that one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elara.decoding.config import SamplingConfig
from elara.decoding.sampling import draw, probabilities
from elara.model import ElaraLM, KVCache, MaskSection


@dataclass
class Draft:
    """tokens: (batch, L), the first drawn by the AR head. proposal: (batch, L-1, vocab), what drew the others."""

    tokens: Tensor
    proposal: Tensor


def mask_groups(starts: list[list[int]], length: int, mask_id: int, device: torch.device) -> MaskSection:
    """One group of `length` masks at each of the starts, (batch, groups)."""
    tokens = torch.full((len(starts), len(starts[0]) * length), mask_id, device=device)
    shared = all(row == starts[0] for row in starts)
    return MaskSection(torch.tensor(starts[0] if shared else starts), length, tokens)


def draft(
    model: ElaraLM,
    first: Tensor,
    mask_hidden: Tensor,
    sampling: SamplingConfig,
    uniform: Tensor,
    allowed: Tensor | None = None,
) -> Draft:
    """Draw a draft behind `first`, (batch,), from the L masks of one group, (batch, L, n_embd).

    The group's first mask stands for `first` itself and is not read. uniform: (batch, L-1).
    """
    proposal = probabilities(model.diffusion_head(mask_hidden[:, 1:]), sampling, allowed)
    return Draft(torch.cat([first[:, None], draw(proposal, uniform)], 1), proposal)


def think_and_talk(model: ElaraLM, tokens: Tensor, cache: KVCache, mask_id: int) -> tuple[Tensor, Tensor]:
    """The one forward of a step: append a draft, (batch, L), with a group of masks behind each of its tokens.

    Returns the AR logits behind every drafted token, (batch, L, vocab), and the hidden states of the mask groups,
    (batch, L groups, L, n_embd). The cache holds the whole draft afterwards: truncate it to what was accepted.
    """
    batch, length = tokens.shape
    starts = [[have + j for j in range(1, length + 1)] for have in cache.lengths]
    output = model(tokens, section=mask_groups(starts, length, mask_id, tokens.device), cache=cache)
    assert output.mask_hidden is not None
    return model.ar_head(output.hidden), output.mask_hidden.view(batch, length, length, -1)


def verify(probs: Tensor, drafted: Draft, limit: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Speculative rejection sampling (arXiv 2211.17192, algorithm 1): the text follows the AR distribution exactly.

    probs: (batch, L, vocab), the AR distribution behind each drafted token. limit: (batch,) in 1..L, how many tokens of
    the draft may stand at most. uniform: (batch, L) in [0, 1). Returns how many tokens stand, (batch,) in 1..limit, and
    the token behind them, (batch,).
    """
    rows = torch.arange(len(probs), device=probs.device)
    ids = drafted.tokens[:, 1:, None]
    p = probs[:, :-1].gather(2, ids)[..., 0]  # (batch, L-1)
    q = drafted.proposal.gather(2, ids)[..., 0]
    passed = (uniform[:, :-1] * q < p).long().cumprod(1)  # u < p / q, until the first that fails
    accepted = torch.minimum(1 + passed.sum(1), limit)
    behind = probs[rows, accepted - 1]  # (batch, vocab)
    rejected = accepted < limit  # else the draft ended or was cut: nothing was refused, the AR distribution stands
    if drafted.proposal.shape[1]:
        refused = drafted.proposal[rows, (accepted - 1).clamp(max=drafted.proposal.shape[1] - 1)]
        residual = (behind - refused).clamp(min=0)
        # all zeros means p = q up to rounding
        behind = torch.where((rejected & (residual.sum(1) > 0))[:, None], residual, behind)
    return accepted, draw(behind, uniform[:, -1])
