"""The 1.00x of the ratios: Elara as one writes it first, with every expert run on every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elara.config import ElaraConfig


class NaiveElara(nn.Module):
    """LayerNorm, learned positions, separate projections, a ModuleList of experts; no cache, no sorting, no TiDAR."""

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        m = config.model
        self.depth = config.trm.depth
        self.embed = nn.Embedding(config.vocab_size, m.n_embd)
        self.position = nn.Embedding(m.context_length, m.n_embd)
        self.blocks = nn.ModuleList(_NaiveBlock(config, moe=i in config.moe_layers) for i in range(m.n_layer))
        self.norm = nn.LayerNorm(m.n_embd)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, seq) -> logits (batch, seq, vocab)."""
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            for _ in range(self.depth):
                x = block(x)
        return F.linear(self.norm(x), self.embed.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Next-token cross entropy of (batch, seq + 1) ids."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class _NaiveBlock(nn.Module):
    def __init__(self, config: ElaraConfig, *, moe: bool) -> None:
        super().__init__()
        m = config.model
        self.heads = m.n_head
        self.norm1, self.norm2 = nn.LayerNorm(m.n_embd), nn.LayerNorm(m.n_embd)
        self.q, self.k, self.v, self.out = (nn.Linear(m.n_embd, m.n_embd) for _ in range(4))
        self.mlp: nn.Module = _NaiveMoE(config) if moe else _NaiveMLP(m.n_embd, m.hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _NaiveMLP(nn.Module):
    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(n_embd, hidden), nn.Linear(n_embd, hidden), nn.Linear(hidden, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class _NaiveMoE(nn.Module):
    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        width, hidden = config.model.n_embd, config.expert_hidden
        self.top_k = config.moe.top_k
        self.router = nn.Linear(width, config.moe.num_experts)
        self.experts = nn.ModuleList(_NaiveMLP(width, hidden) for _ in range(config.moe.num_experts))
        self.shared = _NaiveMLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).sigmoid().topk(self.top_k, dim=-1)
        gates = torch.zeros(*x.shape[:2], len(self.experts), device=x.device)
        gates = gates.scatter(-1, chosen, scores / scores.sum(-1, keepdim=True))
        y: Tensor = self.shared(x)
        for e, expert in enumerate(self.experts):
            y = y + gates[..., e : e + 1] * expert(x)
        return y
