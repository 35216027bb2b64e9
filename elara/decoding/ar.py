"""Autoregressive decoding on a KV cache: read the prompt once, then one token per forward."""

from __future__ import annotations

import torch
from torch import Tensor

from elara.model import ElaraLM, KVCache, MaskSection


def prefill(
    model: ElaraLM, rows: list[list[int]], cache: KVCache, section: MaskSection | None = None
) -> tuple[Tensor, Tensor | None]:
    """Read every row into the cache from its start, whatever it held.

    rows: token ids, not empty, of any lengths. Returns the logits of each row's next token, (batch, vocab), and the
    hidden states of the section's masks, (batch, section, n_embd), when there is one.
    """
    lengths = [len(row) for row in rows]
    device = model.embed.weight.device
    tokens = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = torch.tensor(row)  # padding stands to the right, where no earlier token looks
    cache.truncate([0] * len(rows))
    output = model(tokens.to(device), section=section, cache=cache)
    cache.truncate(lengths)
    last = torch.tensor(lengths, device=device) - 1
    hidden = output.hidden[torch.arange(len(rows), device=device), last]
    return model.ar_head(hidden), output.mask_hidden


def decode_one(model: ElaraLM, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token to every row, (batch,), and return the logits of the next one, (batch, vocab)."""
    hidden = model(tokens[:, None], cache=cache).hidden
    return model.ar_head(hidden[:, -1])
