"""Grouped-query attention with QK-norm and RoPE, causal for clean tokens, block-wise for the mask section.

The mask section never sees a 2S x 2S mask: its queries are taken in chunks of whole blocks, and each chunk meets only
the clean keys before its last block and its own mask keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elara.config import ElaraConfig
from elara.device import to_device
from elara.model import attention_cpu
from elara.model.attention_cpu import CHUNK
from elara.model.cache import KVCache
from elara.model.linear import Linear
from elara.model.moe import DraftRouting, Text
from elara.model.norm import RMSNorm, norm_heads
from elara.model.section import MaskSection

FEW_QUERIES = 16  # below, plain matmuls are the slower ones in decoding
KEPT_LIMIT = 1 << 21  # bytes of one head's square of scores up to which training on a CPU keeps its softmax
PLAIN_LIMIT = 512 * 512  # queries x keys up to which plain bf16 matmuls beat the CPU's flash kernel (2-7x in training)


@dataclass
class View:
    """What all layers of one forward pass share: where the tokens stand and what they may see.

    seq: clean tokens; the section's tokens follow them on the sequence axis.
    cos, sin: (1 or batch, seq + section, 1, head_dim).
    visible: boolean mask of the queries that `chunks` leaves, (1 or batch, 1, queries, keys), or None for plain causal
        or full view. With a cache these are all: the section's keys stand behind the clean ones, for this pass only.
    chunks: without a cache, the section's queries as (first token, last token, clean keys to read, boolean mask).
    drafts: how the section finds its experts.
    text: which tokens are no padding; None = all.
    """

    seq: int
    cos: Tensor
    sin: Tensor
    visible: Tensor | None
    causal: bool
    chunks: list[tuple[int, int, int, Tensor]]
    cache: KVCache | None
    drafts: DraftRouting | None
    text: Text | None = None


def rope_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and signed sin of the rotary embedding in the rotate-half layout (RoFormer, arXiv 2104.09864, eq. 34).

    positions: (rows, seq). Returns two float32 tensors (rows, seq, 1, head_dim); the sine of the first half is
    negated, so that rotate-half is a plain roll by head_dim / 2.
    """
    frequency = base ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / -head_dim)
    angle = positions[:, :, None, None].float() * frequency  # (rows, seq, 1, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def section_visible(section: MaskSection, place: Tensor, keys: int) -> Tensor:
    """What a pass behind a cache may see, boolean (rows, 1, seq + section, keys + section).

    place: (rows, seq), index of each clean token among the keys, which the section's follow at once in every row.
    """
    device, length = place.device, section.block_length
    starts = section.starts.to(device).view(-1, section.starts.shape[-1])  # (1 or rows, blocks)
    behind = place[:, -1:] + 1 + torch.arange(section.length, device=device).view(1, -1)
    index = torch.arange(keys + section.length, device=device)
    clean = index <= place[..., None]  # (rows, seq, keys)
    before = (index < starts[..., None]).repeat_interleave(length, 1)
    first = behind[:, ::length].repeat_interleave(length, 1)[..., None]  # of each mask's own block
    own = (index >= first) & (index < first + length)
    rows = max(len(clean), len(before))
    return torch.cat([clean.expand(rows, -1, -1), (before | own).expand(rows, -1, -1)], 1)[:, None]


def section_chunks(section: MaskSection, keys: int, device: torch.device) -> list[tuple[int, int, int, Tensor]]:
    """Cut the section into chunks of whole blocks with their visibility masks.

    keys: clean keys that exist (cache included), key i standing at position i. Each chunk is
    (first query, end of queries, clean keys read, mask); mask is (1 or batch, 1, queries, clean keys + queries).
    """
    length = section.block_length
    per_chunk = max(1, CHUNK // length)
    starts = section.starts.view(-1, section.starts.shape[-1])  # (1 or batch, n_blocks)
    chunks = []
    for first in range(0, starts.shape[1], per_chunk):
        part = starts[:, first : first + per_chunk]
        blocks = part.shape[1]
        read = keys if part.is_cuda else min(keys, int(part.max()))
        clean = (
            torch.arange(read) < part.cpu()[..., None]
            if not part.is_cuda
            else (torch.arange(read, device=part.device) < part[..., None])
        )
        own = torch.eye(blocks, dtype=torch.bool, device=part.device).expand(part.shape[0], -1, -1)
        mask = torch.cat([clean, own.repeat_interleave(length, 2)], 2).repeat_interleave(length, 1)
        end = (first + blocks) * length
        chunks.append((first * length, end, read, to_device(mask[:, None], device)))
    return chunks


class Attention(nn.Module):
    """Multi-head attention over a shared `View`; RMSNorm of every query and key head before RoPE (QK-norm)."""

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.model.n_head, config.n_kv_head, config.head_dim
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.qkv = Linear(config.model.n_embd, width, bias=config.model.bias)
        self.out = Linear(self.n_head * self.head_dim, config.model.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.model.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.model.norm_eps)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """x: (batch, seq + section, n_embd), already normed; `layer` is the effective layer's place in the cache."""
        qkv = self.qkv(x).unflatten(2, (-1, self.head_dim))  # (batch, seq + section, heads, head_dim)
        if _trains_on_cpu(qkv, view):
            y = attention_cpu.attention(
                qkv, self.q_norm.weight, self.k_norm.weight, view.cos, view.sin,
                heads=self.n_head, eps=self.q_norm.eps, seq=view.seq, chunks=view.chunks,
            )  # fmt: skip
        else:
            y = self._attention(qkv, view, layer)
        out: Tensor = self.out(y)
        return out

    def _attention(self, qkv: Tensor, view: View, layer: int) -> Tensor:
        """qkv: (batch, seq + section, heads + 2 kv heads, head_dim) -> (batch, seq + section, heads * head_dim)."""
        batch, total = qkv.shape[:2]
        heads, kv, seq = self.n_head, self.n_kv_head, view.seq
        q, k, v = qkv.split([heads, kv, kv], dim=2)
        if qkv.device.type == "cpu" and not torch.is_grad_enabled():  # a token's time is its kernels' number
            weights = [(heads, self.q_norm.weight), (kv, self.k_norm.weight)]
            turned = _rotate(norm_heads(qkv[:, :, : heads + kv], weights, self.q_norm.eps), view)
            q, k = turned.split([heads, kv], dim=2)
        else:
            q, k = _rotate(self.q_norm(q), view), _rotate(self.k_norm(k), view)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (batch, heads, total, head_dim)
        first_queries = seq if view.chunks else total
        keys, values = k[:, :, :first_queries], v[:, :, :first_queries]
        if view.cache is not None:
            keys, values = view.cache.append(layer, keys, values)
        parts = [_attend(q[:, :, :first_queries], keys, values, view.visible, causal=view.causal)]
        for first, end, read, mask in view.chunks:
            here = slice(seq + first, seq + end)
            chunk_keys = torch.cat([keys[:, :, :read], k[:, :, here]], 2)
            chunk_values = torch.cat([values[:, :, :read], v[:, :, here]], 2)
            parts.append(_attend(q[:, :, here], chunk_keys, chunk_values, mask))
        y = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        return y.transpose(1, 2).reshape(batch, total, -1)

    def skip(self, x: Tensor, view: View, layers: list[int]) -> None:
        """Fill the cache of effective layers that are not computed with keys and values of the state in front of them.

        x: (batch, seq + section, n_embd), already normed.
        """
        if view.cache is None or not layers:
            return
        x = x[:, : view.seq]
        qkv = self.qkv(x).view(*x.shape[:2], -1, self.head_dim)
        _, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        k = _rotate(self.k_norm(k), view)
        for layer in layers:
            view.cache.append(layer, k.transpose(1, 2), v.transpose(1, 2))


def _trains_on_cpu(qkv: Tensor, view: View) -> bool:
    return (
        qkv.device.type == "cpu"
        and torch.is_grad_enabled()
        and view.cache is None
        and view.causal
        and view.seq**2 * qkv.itemsize <= KEPT_LIMIT
        and not torch.compiler.is_compiling()  # the compiler fuses in its own way
    )


def _rotate(x: Tensor, view: View) -> Tensor:
    """RoPE of x (batch, tokens, heads, head_dim), the first tokens of the view."""
    cos, sin = view.cos.to(x.dtype), view.sin.to(x.dtype)
    if x.shape[1] < cos.shape[1]:
        cos, sin = cos[:, : x.shape[1]], sin[:, : x.shape[1]]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """Attention of q (batch, heads, queries, dim) over k, v (batch, kv heads, keys, dim); True in `mask` is visible."""
    queries, narrow, on_cpu = q.shape[2], q.dtype == torch.bfloat16, q.device.type == "cpu"
    if on_cpu and (torch.is_grad_enabled() or (narrow and queries >= FEW_QUERIES)):
        chunk_of_masks = mask is not None and queries <= CHUNK
        short = narrow and queries * k.shape[2] <= PLAIN_LIMIT
        if chunk_of_masks or short:
            return _attend_plain(q, k, v, mask, causal=causal)
    dtype = torch.float32 if on_cpu and narrow and queries == 1 else q.dtype  # 2-3 times as fast, casts included
    y = F.scaled_dot_product_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.to(q.dtype)


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = q @ k.transpose(2, 3)
    bias = 0.0 if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    weights = torch.add(bias, scores, alpha=q.shape[3] ** -0.5) if mask is not None else scores * q.shape[3] ** -0.5
    return weights.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v
