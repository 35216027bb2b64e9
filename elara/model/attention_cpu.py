"""Attention of a training step on a CPU, from projected heads to mixed values, as one operation with its own backward.

Autograd's composition spends more time on memory than on products: scores in float32, masks over whole squares, zero
gradients of slices, a copy for every layout. Here queries are taken in chunks that meet only the keys before them, and
what is kept for the backward pass is the softmax in the narrow type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 64  # queries per chunk: small enough to skip most hidden keys, whole enough for good matmuls

Chunks = list[tuple[int, int, int, Tensor]]


def attention(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, heads: int, eps: float, seq: int,
    chunks: Chunks,
) -> Tensor:  # fmt: skip
    """RMSNorm of q and k, RoPE, causal attention of `seq` tokens and that of the section's chunks.

    qkv: (batch, tokens, heads + 2 kv heads, head_dim). q_weight, k_weight: (head_dim) of the norms. cos, sin: as in
    `View`. chunks: (first, end, clean keys, boolean mask) of the section behind the clean tokens, as in `View`.
    Returns (batch, tokens, heads * head_dim).
    """
    with torch.autocast("cpu", enabled=False):  # it would cast what is meant to be wide
        y: Tensor = _Attention.apply(qkv, q_weight, k_weight, cos, sin, heads, eps, seq, chunks)
    return y


class _Attention(torch.autograd.Function):
    """Inside, heads come first, (heads, batch, tokens, head_dim): q, k and v lie behind each other in one tensor."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
        seq: int, chunks: Chunks,
    ) -> Tensor:  # fmt: skip
        batch, tokens, total, dim = qkv.shape
        kv = (total - heads) // 2
        x = qkv.permute(2, 0, 1, 3)
        weight = torch.cat([q_weight.expand(heads, dim), k_weight.expand(kv, dim)]).view(-1, 1, 1, dim)
        angles = cos.squeeze(2), sin.squeeze(2)  # (1 or batch, tokens, dim)
        inverse = _inverse(x[: heads + kv], eps)
        unit = torch.mul(x[: heads + kv], inverse, out=qkv.new_empty(heads + kv, batch, tokens, dim))
        inside = qkv.new_empty(total, batch, tokens, dim)
        inside[heads + kv :] = x[heads + kv :]
        turned = torch.mul(unit, (weight * angles[0]).to(unit.dtype), out=inside[: heads + kv])
        _add_rolled(turned, unit, (weight.roll(dim // 2, -1) * angles[1]).to(unit.dtype))
        inside[:heads] *= dim**-0.5
        y = qkv.new_empty(batch, tokens, heads, dim)
        out = y.permute(2, 0, 1, 3)
        kept = []
        for first, end, queries, keys, values, mask in _pieces(inside, heads, kv, seq, chunks):
            scores = queries @ keys.mT  # (kv * batch, group * queries, keys)
            masked = scores.view(kv, batch, -1, end - first, scores.shape[2])[..., -mask.shape[-1] :]
            masked += torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
            weights = torch.softmax(scores, -1)
            out[:, :, first:end] = _ungrouped(weights @ values, heads, kv, batch)
            kept.append(weights)
        ctx.save_for_backward(inside, unit, inverse, weight, *angles, *kept, *(mask for *_, mask in chunks))
        ctx.rest = heads, kv, seq, [chunk[:3] for chunk in chunks]
        return y.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, kv, seq, places = ctx.rest
        inside, unit, inverse, weight, cos, sin, *rest = ctx.saved_tensors
        total, batch, tokens, dim = inside.shape
        count = len(rest) - len(places)
        chunks = [(*place, mask) for place, mask in zip(places, rest[count:], strict=True)]
        grad = grad.view(batch, tokens, heads, dim).permute(2, 0, 1, 3)
        sums = torch.zeros_like(inside)
        dk, dv = sums[heads : heads + kv].view(-1, tokens, dim), sums[heads + kv :].view(-1, tokens, dim)
        pieces = _pieces(inside, heads, kv, seq, chunks)
        for weights, (first, end, queries, keys, values, _) in zip(rest[:count], pieces, strict=True):
            g = _grouped(grad[:, :, first:end], kv)
            d_scores = torch._softmax_backward_data(g @ values.mT, weights, -1, weights.dtype)
            sums[:heads, :, first:end] = _ungrouped(d_scores @ keys, heads, kv, batch)
            clean = end if first < seq else keys.shape[1] - (end - first)
            for into, part in ((dk, d_scores.mT @ queries), (dv, weights.mT @ g)):
                into[:, :clean] += part[:, :clean]
                if first >= seq:
                    into[:, first:end] += part[:, clean:]
        sums[:heads] *= dim**-0.5
        # back through RoPE, y = unit * weight turned by the angle, and the norm
        out = grad.new_empty(batch, tokens, total, dim)
        x_grad = out.permute(2, 0, 1, 3)
        x_grad[heads + kv :] = sums[heads + kv :]
        turned = sums[: heads + kv]
        back = turned * cos.to(turned.dtype)
        _add_rolled(back, turned, sin.to(turned.dtype).roll(dim // 2, -1))
        product = back * unit
        narrow = weight.to(unit.dtype)
        along = product.view(heads + kv, -1, dim) @ narrow.view(-1, dim, 1)  # sum of gradient * weight * unit
        ones = product.new_ones(heads + kv, 1, batch * tokens)
        d_weight = (ones @ product.view(heads + kv, -1, dim)).to(weight.dtype).view(-1, dim)
        back.mul_(narrow).addcmul_(unit, along.view(*unit.shape[:3], 1), value=-1 / dim)
        torch.mul(back, inverse, out=x_grad[: heads + kv])
        return out, d_weight[:heads].sum(0), d_weight[heads:].sum(0), *[None] * 6


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), (..., 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


def _add_rolled(y: Tensor, x: Tensor, factor: Tensor) -> None:
    """y += roll(x, half) * factor without making the roll."""
    half = x.shape[-1] // 2
    y[..., :half].addcmul_(x[..., half:], factor[..., :half])
    y[..., half:].addcmul_(x[..., :half], factor[..., half:])


def _pieces(
    inside: Tensor, heads: int, kv: int, seq: int, chunks: Chunks
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor, Tensor]]:
    """Of every chunk: its first and last token, queries, keys and values by (kv head, row), mask of the last keys."""
    tokens, dim = inside.shape[2:]
    q = inside[:heads]
    k, v = inside[heads : heads + kv].view(-1, tokens, dim), inside[heads + kv :].view(-1, tokens, dim)
    triangle = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    for first in range(0, seq, CHUNK):
        end = min(first + CHUNK, seq)
        mask = triangle[: end - first, : end - first]
        yield first, end, _grouped(q[:, :, first:end], kv), k[:, :end], v[:, :end], mask
    for first, end, read, mask in chunks:
        here = slice(seq + first, seq + end)
        keys, values = (torch.cat([t[:, :read], t[:, here]], 1) for t in (k, v))
        yield here.start, here.stop, _grouped(q[:, :, here], kv), keys, values, mask


def _grouped(x: Tensor, kv: int) -> Tensor:
    """(heads, batch, queries, dim) -> (kv * batch, group * queries, dim): the queries that share keys side by side."""
    heads, batch, queries, dim = x.shape
    return x.view(kv, heads // kv, batch, queries, dim).transpose(1, 2).reshape(kv * batch, -1, dim)


def _ungrouped(x: Tensor, heads: int, kv: int, batch: int) -> Tensor:
    """Inverse of `_grouped`."""
    return x.view(kv, batch, heads // kv, -1, x.shape[2]).transpose(1, 2).flatten(0, 1)
