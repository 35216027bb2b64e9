"""Attention of the TiDAR section as one FlexAttention call, beside the split form of elara/model/attention.py.

    python experiments/training-speed/flex.py      # on a CPU: forward, both forms must give the same numbers
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from elara.model import MaskSection
from elara.model.attention import _attend, section_chunks

Heads = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (batch, heads, seq + section, head_dim) -> as q


def block_mask(section: MaskSection, seq: int, device: torch.device) -> BlockMask:
    """Who sees whom: clean tokens what is before them, a block of masks the clean tokens before it and itself."""
    length, starts = section.block_length, section.starts.to(device)
    total = seq + section.length

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = ((q - seq) // length).clamp(min=0)
        mask_sees = torch.where(k < seq, k < starts[block], (k - seq) // length == block)
        return torch.where(q < seq, k <= q, mask_sees)

    return create_block_mask(sees, None, None, total, total, device=device.type)


def flex(section: MaskSection, seq: int, device: torch.device, *, compiled: bool) -> Heads:
    """One call for all tokens; `compiled` as a kernel of its own (GPU), else the formula, eagerly."""
    mask = block_mask(section, seq, device)
    call = torch.compile(flex_attention) if compiled else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = call(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return y

    return run


def split(section: MaskSection, seq: int, device: torch.device) -> Heads:
    """What the model does: causal attention of the clean tokens, then chunks of masks over the keys they can see."""
    chunks = section_chunks(section, seq, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [_attend(q[:, :, :seq], k[:, :, :seq], v[:, :, :seq], None, causal=True)]
        for first, end, read, mask in chunks:
            here = slice(seq + first, seq + end)
            keys, values = (torch.cat([t[:, :, :read], t[:, :, here]], 2) for t in (k, v))
            parts.append(_attend(q[:, :, here], keys, values, mask))
        return torch.cat(parts, 2)

    return run


def some_blocks(seq: int, length: int, fraction: float) -> MaskSection:
    """Blocks as a training step draws them."""
    starts = torch.arange(2, seq - length + 1, length)
    kept = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0))[: round(fraction * len(starts))]
    return MaskSection(starts[kept.sort().values], length, torch.empty(0))


def largest_difference(seq: int, length: int, fraction: float, heads: int, kv: int, dim: int) -> float:
    """Between both forms, forward, float32, on a CPU."""
    section, cpu = some_blocks(seq, length, fraction), torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, seq + section.length, dim, generator=generator) for n in (heads, kv, kv))
    with torch.no_grad():
        one, other = (form(q, k, v) for form in (split(section, seq, cpu), flex(section, seq, cpu, compiled=False)))
    return float((one - other).abs().max())


if __name__ == "__main__":
    for shape in ((128, 4, 0.25, 4, 4, 64), (200, 8, 1.0, 4, 2, 16), (256, 4, 0.5, 2, 1, 80)):
        print(*shape, f"largest difference {largest_difference(*shape):.1e}")
