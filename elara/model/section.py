"""The mask section of TiDAR (arXiv 2511.08923, section 3): blocks of mask tokens behind the clean sequence.

A block that starts at position s stands for the tokens s .. s+L-1. Its mask tokens see the clean tokens before s
and, in both directions, each other. Training supervises them, a decoding step reads drafts from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elara.config import TiDARConfig
from elara.device import to_device


@dataclass
class MaskSection:
    """Blocks of mask tokens that one forward pass carries beside its clean tokens.

    starts: first position of every block, (n_blocks,) for all rows alike or (batch, n_blocks); ascending, on the CPU
        in training so that the attention can cut its keys without waiting for the device.
    block_length: tokens per block.
    tokens: what stands in the section, (batch, n_blocks * block_length); all [MASK] for a draft.
    """

    starts: Tensor
    block_length: int
    tokens: Tensor

    @property
    def length(self) -> int:
        """Tokens in the section of one row."""
        return self.starts.shape[-1] * self.block_length

    def positions(self) -> Tensor:
        """Position that each section token stands for, (1 or batch, length)."""
        return block_positions(self.starts.view(-1, self.starts.shape[-1]), self.block_length)


def block_positions(starts: Tensor, length: int) -> Tensor:
    """Positions of all tokens of blocks that begin at `starts`, (..., n_blocks) -> (..., n_blocks * length)."""
    return (starts[..., None] + torch.arange(length, device=starts.device)).flatten(-2)


@dataclass
class Supervision:
    """What the diffusion head must say. targets: (batch, length) ids; weights: (batch, length) or None for all ones."""

    targets: Tensor
    weights: Tensor | None


def draw_starts(seq: int, config: TiDARConfig, generator: torch.Generator) -> Tensor:
    """First positions of a step's blocks in rows of `seq` tokens, ascending; the first that `draw_section` draws."""
    length = config.block_length
    offset = 1 + int(torch.randint(min(length, seq - length), (1,), generator=generator))
    starts = torch.arange(offset, seq - length + 1, length)
    keep = max(1, round(config.block_fraction * len(starts)))
    if keep < len(starts):
        starts = starts[torch.randperm(len(starts), generator=generator)[:keep].sort().values]
    return starts


def draw_section(
    tokens: Tensor, config: TiDARConfig, mask_id: int, generator: torch.Generator, place: tuple[int, int] = (0, 1)
) -> tuple[MaskSection, Supervision]:
    """Choose this step's blocks and hide their tokens.

    tokens: (batch, seq) ids, seq > block_length. The grid of blocks gets a random offset (starts >= 1, so that every
    block has an anchor before it), and `block_fraction` of its blocks are kept. `generator` lives on the CPU. place:
    (rank, ranks), equally many rows each; with equal generators the ranks together draw what one would for all rows.

    With schedule `linear` or `cosine` every block draws a time t and hides each token with probability m(t); hidden
    tokens are weighted with m'(t) / m(t), which makes the mean an upper bound of the negative log-likelihood
    (MDLM, arXiv 2406.07524, eq. 10).
    """
    batch, seq = tokens.shape
    starts = draw_starts(seq, config, generator)
    section = MaskSection(starts, config.block_length, tokens)
    targets = tokens[:, to_device(section.positions()[0], tokens.device)]
    if config.schedule == "full":
        section.tokens = torch.full_like(targets, mask_id)
        return section, Supervision(targets, None)
    rank, ranks = place
    hidden, weights = _random_mask(batch * ranks, len(starts), config, generator)
    mine = slice(rank * batch, (rank + 1) * batch)
    hidden, weights = to_device(hidden[mine], tokens.device), to_device(weights[mine], tokens.device)
    section.tokens = torch.where(hidden, mask_id, targets)
    return section, Supervision(targets, weights)


def _random_mask(batch: int, blocks: int, config: TiDARConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens are hidden and their loss weights, both (batch, blocks * length). Times are stratified."""
    count = batch * blocks
    time = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    time = time.clamp(min=0.5 / config.block_length)[:, None]  # bounds the weight of a nearly clean block
    if config.schedule == "linear":
        rate, weight = time, 1 / time
    else:
        rate = 1 - torch.cos(time * math.pi / 2)
        weight = (math.pi / 2) / torch.tan(time * math.pi / 4)
    hidden = torch.rand(count, config.block_length, generator=generator) < rate
    return hidden.view(batch, -1), (hidden * weight).view(batch, -1)
