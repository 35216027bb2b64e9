"""Block diffusion: the diffusion head writes block after block, each denoised from masks in several passes.

As in Block Diffusion (arXiv 2503.09573, section 3.3) and LLaDA (arXiv 2502.09992, section 2.4): every pass proposes a
token at each mask, and the surest ones, or the leftmost, are revealed. The text does not follow the AR distribution. A
model with `tidar.chain` proposes from left to right, as it was trained: each proposal follows the token before it,
which is a proposal itself where that place is still masked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elara.decoding.engine import Engine, Row
from elara.decoding.sampling import draw, probabilities
from elara.decoding.tidar import mask_groups


def denoise_step(engine: Engine) -> None:
    """One pass over the current block of every row; a block that is revealed as far as needed goes to its text."""
    assert engine.mask_id is not None
    mask, rows, length = engine.mask_id, engine.rows, engine.model.config.tidar.block_length
    fresh = [i for i, row in enumerate(rows) if not row.block]
    engine.slide([i for i in fresh if engine.cache.lengths[i] + rows[i].unread + length > engine.context])
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
    output = engine.model(tokens, section=section, cache=engine.cache, exit_threshold=engine.exit_threshold)
    proposed = _propose(engine, output.mask_hidden)
    for row, proposals in zip(rows, proposed, strict=True):
        row.new, row.drafted, row.accepted, row.unread = [], 0, 0, 1
        if not all(math.isfinite(sure) for _, sure in proposals.values()):
            row.fail()
            continue
        _reveal(row, proposals)
        ready = row.block.index(mask) if mask in row.block else length
        if ready >= min(length, row.left) or any(token in row.sampling.stop for token in row.block[:ready]):
            row.write(row.block[:ready])
            row.block, row.unread = [], len(row.new)
    kept = [have + len(text) - bool(row.block) for have, text, row in zip(held, texts, rows, strict=True)]
    engine.cache.truncate(kept)


def _propose(engine: Engine, mask_hidden: Tensor) -> list[dict[int, tuple[int, float]]]:
    """A token for every masked place of each row's block, and its probability; mask_hidden: (rows, length, n_embd)."""
    mask, length = engine.mask_id, mask_hidden.shape[1]
    chained = engine.model.chain is not None
    found: list[dict[int, tuple[int, float]]] = [{} for _ in engine.rows]
    blocks = [[row.text[-1], *row.block] for row in engine.rows]  # filled up with proposals as they are made
    for places in [[i] for i in range(length)] if chained else [list(range(length))]:
        previous = torch.tensor([[block[i] for i in places] for block in blocks], device=engine.device)
        logits = engine.model.diffusion_head(mask_hidden[:, places], previous)
        logits[..., mask] = -torch.inf
        for row, block, proposals, own in zip(engine.rows, blocks, found, logits, strict=True):
            hidden = [n for n, i in enumerate(places) if row.block[i] == mask]
            if not hidden:
                continue
            for n, token, sure in zip(hidden, *_choose(row, own[hidden], engine.allowed), strict=True):
                proposals[places[n]] = token, sure
                block[places[n] + 1] = token
    return found


def _choose(row: Row, logits: Tensor, allowed: Tensor | None) -> tuple[list[int], list[float]]:
    """Draw a token at each place, (n, vocab); how sure the head is of it shows at temperature 1, nothing cut off: nan
    where it gives no numbers."""
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    probs = probabilities(logits, row.sampling)
    tokens = draw(probs, torch.rand(len(probs), generator=row.generator).to(probs.device))
    tokens = tokens.clamp(max=probs.shape[-1] - 1)  # where they are nan, which shows in how sure it is
    sure = logits.to(probs.dtype).softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), sure.tolist()


def _reveal(row: Row, proposals: dict[int, tuple[int, float]]) -> None:
    """Put proposals in place of this pass's share of the masks, and of those behind that are sure enough."""
    count = -(-len(proposals) // row.passes)  # evenly over the passes that are left
    row.passes = max(1, row.passes - 1)
    places = sorted(proposals)
    if row.sampling.order == "confidence":
        places.sort(key=lambda i: -proposals[i][1])
    for rank, i in enumerate(places):
        token, sure = proposals[i]
        if rank >= count and (row.sampling.confidence is None or sure < row.sampling.confidence):
            break
        row.block[i] = token
