"""Block diffusion: the diffusion head writes block after block, each denoised from masks in several passes.

As in Block Diffusion (arXiv 2503.09573, section 3.3) and LLaDA (arXiv 2502.09992, section 2.4): every pass proposes a
token at each mask, and the surest ones, or the leftmost, are revealed. The text does not follow the AR distribution.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from elara.decoding.engine import Engine, Row
from elara.decoding.sampling import draw, probabilities
from elara.decoding.tidar import mask_groups


def denoise_step(engine: Engine) -> None:
    """One pass over the current block of every row; a block that has no mask left is written to its text."""
    assert engine.mask_id is not None
    mask, rows, length = engine.mask_id, engine.rows, engine.model.config.tidar.block_length
    fresh = [i for i, row in enumerate(rows) if not row.block]
    engine.slide([i for i in fresh if engine.cache.lengths[i] + 2 * length > engine.context])
    for i in fresh:
        rows[i].block = [mask] * length
        rows[i].passes = rows[i].sampling.steps or length
    held = engine.cache.lengths
    # what the cache lacks: the block written last, or the last token alone, which every pass over a block reads again
    texts = [row.text[len(row.text) - row.unread :] for row in rows]
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=engine.device)
    starts = [[have + len(text)] for have, text in zip(held, texts, strict=True)]
    section = mask_groups(starts, length, mask, engine.device)
    section.tokens = torch.tensor([row.block for row in rows], device=engine.device)
    mask_hidden = engine.model(tokens, section=section, cache=engine.cache).mask_hidden
    engine.cache.truncate([have + len(text) - 1 for have, text in zip(held, texts, strict=True)])
    before = torch.tensor([[row.text[-1], *row.block[:-1]] for row in rows], device=engine.device)
    for row, logits in zip(rows, engine.model.diffusion_head(mask_hidden, before), strict=True):
        row.new, row.drafted, row.accepted, row.unread = [], 0, 0, 1
        _reveal(row, logits, mask, engine.allowed)
        if mask not in row.block:
            row.write(row.block)
            row.block, row.unread = [], len(row.new)


def _reveal(row: Row, logits: Tensor, mask: int, allowed: Tensor | None) -> None:
    """Put tokens in place of some masks of the row's block; logits: (length, vocab)."""
    places = [i for i, token in enumerate(row.block) if token == mask]
    probs = probabilities(logits[places], row.sampling, allowed)
    tokens = draw(probs, torch.rand(len(places), generator=row.generator).to(probs.device))
    # greedy choices are all certain: how sure the head is shows at temperature 1
    sure = probabilities(logits[places], replace(row.sampling, temperature=1.0), allowed)
    sureness = sure.gather(1, tokens[:, None])[:, 0].tolist()
    count = -(-len(places) // row.passes)  # evenly over the passes that are left
    row.passes = max(1, row.passes - 1)
    order = list(range(len(places)))
    if row.sampling.order == "confidence":
        order.sort(key=lambda i: -sureness[i])
    limit = row.sampling.confidence
    for rank, i in enumerate(order):
        if rank < count or (limit is not None and sureness[i] >= limit):
            row.block[places[i]] = int(tokens[i])
