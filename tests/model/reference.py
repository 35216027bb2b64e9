"""The architecture again, as slow and plain as its definition: loops, no cache, no chunks, a full 2S x 2S mask.

Every function takes the parameters of an `ElaraLM` (a dict of tensors), so that outputs and gradients of the fast model
can be compared with these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elara.config import ElaraConfig

Parameters = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


def rope(x: Tensor, position: int, base: float) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of the last axis by position * base^(-2i/d)."""
    half = x.shape[-1] // 2
    out = [torch.empty(0)] * (2 * half)
    for i in range(half):
        angle = position * base ** (-2 * i / (2 * half))
        first, second = x[..., i], x[..., i + half]
        out[i] = first * math.cos(angle) - second * math.sin(angle)
        out[i + half] = second * math.cos(angle) + first * math.sin(angle)
    return torch.stack(out, -1)


def swiglu_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    hidden = len(gate_up) // 2
    gate, up = x @ gate_up[:hidden].T, x @ gate_up[hidden:].T
    return (gate * torch.sigmoid(gate) * up) @ down.T


def visibility(seq: int, starts: list[int], length: int) -> Tensor:
    """What each of seq clean and len(starts) * length mask tokens sees, straight from the definition."""
    total = seq + len(starts) * length
    visible = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(total):
            if query < seq:
                visible[query, key] = key <= query
            else:
                block = (query - seq) // length
                if key < seq:
                    visible[query, key] = key < starts[block]
                else:
                    visible[query, key] = (key - seq) // length == block
    return visible


def attention(
    config: ElaraConfig, p: Parameters, name: str, x: Tensor, positions: list[list[int]], visible: list[Tensor]
) -> Tensor:
    """x: (batch, total, n_embd); positions and visibility of every row."""
    d, heads, kv_heads = config.head_dim, config.model.n_head, config.n_kv_head
    rows = []
    for row in range(len(x)):
        tokens = []
        for i, token in enumerate(x[row]):
            qkv = p[f"{name}.qkv.weight"] @ token
            if config.model.bias:
                qkv = qkv + p[f"{name}.qkv.bias"]
            parts = qkv.view(heads + 2 * kv_heads, d)
            q = rms_norm(parts[:heads], p[f"{name}.q_norm.weight"], config.model.norm_eps)
            k = rms_norm(parts[heads : heads + kv_heads], p[f"{name}.k_norm.weight"], config.model.norm_eps)
            place, base = positions[row][i], config.model.rope_base
            tokens.append((rope(q, place, base), rope(k, place, base), parts[-kv_heads:]))
        outs = []
        for i in range(len(tokens)):
            seen = [j for j in range(len(tokens)) if visible[row][i, j]]
            mixed = []
            for head in range(heads):
                group = head * kv_heads // heads  # the key/value head that this query head shares
                q = tokens[i][0][head]
                scores = torch.stack([q @ tokens[j][1][group] / math.sqrt(d) for j in seen])
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                mixed.append(sum(w * tokens[j][2][group] for w, j in zip(weights, seen, strict=True)))
            outs.append(p[f"{name}.out.weight"] @ torch.cat(mixed))
        rows.append(torch.stack(outs))
    return torch.stack(rows)


@dataclass
class Routed:
    """What one MoE layer did in one pass: load (2, experts) by section, and its penalty."""

    load: Tensor
    penalty: Tensor


def moe(
    config: ElaraConfig, p: Parameters, name: str, x: Tensor, seq: int, bias: Tensor, starts: list[list[int]]
) -> tuple[Tensor, Routed]:
    """Every expert on every token, then a weighted sum over the chosen ones. x: (batch, total, n_embd)."""
    length, kind = config.tidar.block_length, config.tidar.draft_routing
    c = config.moe
    load = torch.zeros(2, c.num_experts)
    routed = seq if kind == "anchor" else x.shape[1]  # tokens that a router saw: only these are penalised
    out = torch.zeros_like(x)
    balance, z = x.new_zeros(()), x.new_zeros(())
    for row in range(len(x)):
        counts, shares = torch.zeros(c.num_experts), x.new_zeros(c.num_experts)
        all_logits = [p[f"{name}.router.weight"] @ token for token in x[row]]
        for i, token in enumerate(x[row]):
            logits = all_logits[i]
            scores = 1 / (1 + torch.exp(-logits))
            block = (i - seq) // length if i >= seq else 0
            if i >= seq and kind == "anchor":
                scores = 1 / (1 + torch.exp(-all_logits[starts[row][block] - 1]))
            elif i >= seq and kind == "block":
                own = all_logits[seq + block * length : seq + (block + 1) * length]
                scores = torch.stack([1 / (1 + torch.exp(-each)) for each in own]).mean(0)
            biased = (scores.detach() + bias).tolist()
            chosen = sorted(range(c.num_experts), key=lambda e: -biased[e])[: c.top_k]
            unbiased = sorted(range(c.num_experts), key=lambda e: -scores[e].item())[: c.top_k]
            total = sum(scores[e] for e in chosen)
            for e in range(c.num_experts):
                y = swiglu_mlp(token, p[f"{name}.experts.gate_up"][e], p[f"{name}.experts.down"][e])
                if e in chosen:
                    out[row, i] = out[row, i] + scores[e] / total * c.gate_scale * y
                    load[0 if i < seq else 1, e] += 1
                counts[e] += e in unbiased and i < routed
            if i < routed:
                shares = shares + scores / scores.sum()
                z = z + torch.log(torch.exp(logits).sum()) ** 2
        tokens = routed
        for e in range(c.num_experts):
            balance = balance + counts[e] * c.num_experts / (c.top_k * tokens) * shares[e] / tokens
        if c.num_shared:
            out[row] += swiglu_mlp(x[row], p[f"{name}.shared.gate_up.weight"], p[f"{name}.shared.down.weight"])
    penalty = c.balance_loss * balance / len(x) + c.z_loss * z / (len(x) * routed)
    return out, Routed(load, penalty)


@dataclass
class Result:
    """hidden, mask_hidden: (batch, tokens, n_embd) behind the final norm; routed: [layer][pass]."""

    hidden: Tensor
    mask_hidden: Tensor
    routed: dict[int, list[Routed]] = field(default_factory=dict)


def forward(
    config: ElaraConfig,
    p: Parameters,
    tokens: Tensor,
    *,
    starts: list[list[int]] | None = None,
    section_tokens: Tensor | None = None,
    depth: int | None = None,
) -> Result:
    """The whole decoder. tokens: (batch, seq); starts: of every row's blocks; section_tokens: (batch, blocks * L)."""
    batch, seq = tokens.shape
    depth = depth or config.trm.depth
    starts = starts or [[] for _ in range(batch)]
    length = config.tidar.block_length
    if section_tokens is not None:
        tokens = torch.cat([tokens, section_tokens], 1)
    positions = [[*range(seq), *(start + i for start in row for i in range(length))] for row in starts]
    visible = [visibility(seq, row, length) for row in starts]
    blocks = range(config.model.n_layer)
    order = [i for i in blocks for _ in range(depth)] if config.trm.order == "block" else [*blocks] * depth
    eps = config.model.norm_eps
    x = p["embed.weight"][tokens]
    result = Result(x, x)
    for i in order:
        name = f"blocks.{i}"
        normed = rms_norm(x, p[f"{name}.attention_norm.weight"], eps)
        x = x + attention(config, p, f"{name}.attention", normed, positions, visible)
        normed = rms_norm(x, p[f"{name}.mlp_norm.weight"], eps)
        if i in config.moe_layers:
            biases = p[f"{name}.mlp.router.selection_bias"]
            recursion = len(result.routed.get(i, []))  # how often this block was applied before
            y, routed = moe(config, p, f"{name}.mlp", normed, seq, biases[min(recursion, len(biases) - 1)], starts)
            result.routed.setdefault(i, []).append(routed)
        else:
            y = swiglu_mlp(normed, p[f"{name}.mlp.gate_up.weight"], p[f"{name}.mlp.down.weight"])
        x = x + y
    x = rms_norm(x, p["norm.weight"], eps)
    result.hidden, result.mask_hidden = x[:, :seq], x[:, seq:]
    return result
