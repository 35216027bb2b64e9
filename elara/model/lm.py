"""Elara: a decoder whose blocks are applied `depth` times, some of them mixtures of experts, with two heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elara.config import ElaraConfig
from elara.device import to_device
from elara.model.attention import Attention, View, rope_angles, section_chunks, section_visible
from elara.model.cache import KVCache
from elara.model.linear import Linear, linear
from elara.model.mlp import MLP
from elara.model.moe import Choice, DraftRouting, MoE, RoutingStats, Text
from elara.model.norm import RMSNorm
from elara.model.section import MaskSection


@dataclass
class Output:
    """hidden: (batch, seq, n_embd); mask_hidden: (batch, section, n_embd) or None; both behind the final norm."""

    hidden: Tensor
    mask_hidden: Tensor | None
    routing: RoutingStats


class Block(nn.Module):
    """One physical block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ElaraConfig, *, moe: bool) -> None:
        super().__init__()
        m = config.model
        self.attention_norm = RMSNorm(m.n_embd, m.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(m.n_embd, m.norm_eps)
        self.mlp: MoE | MLP = MoE(config) if moe else MLP(m.n_embd, m.hidden)
        self.dropout = m.dropout

    def forward(
        self, x: Tensor, view: View, layers: list[tuple[int, int]], exit_threshold: float | None = None
    ) -> tuple[Tensor, list[Choice]]:
        """Apply the block once per entry of `layers`, (recursion pass, effective layer), or until the state settles."""
        choices = []
        weights = self.mlp.experts.weights(x.device.type) if isinstance(self.mlp, MoE) else None
        for done, (recursion, layer) in enumerate(layers, 1):
            before = x
            x = x + self._drop(self.attention(self.attention_norm(x), view, layer))
            normed = self.mlp_norm(x)
            if isinstance(self.mlp, MoE):
                assert weights is not None
                y, choice = self.mlp(normed, weights, recursion, view.drafts, view.text)
                choices.append(choice)
            else:
                y = self.mlp(normed)
            x = x + self._drop(y)
            if exit_threshold is not None and done < len(layers) and settled(before, x, exit_threshold):
                self.skip(x, view, [layer for _, layer in layers[done:]])
                break
        return x, choices

    def skip(self, x: Tensor, view: View, layers: list[int]) -> None:
        """Fill the cache of effective layers that are not computed from the state x in front of them."""
        self.attention.skip(self.attention_norm(x), view, layers)

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


def settled(before: Tensor, after: Tensor, threshold: float) -> bool:
    """Whether a pass changed every token's state, (batch, tokens, n_embd), by less than `threshold` of its norm."""
    return bool(((after - before).norm(dim=-1) < threshold * before.norm(dim=-1)).all())


class DraftChain(nn.Module):
    """Tells a mask the token before it: masks are denoised together, so none knows what its neighbour will say.

    A draft is drawn from left to right through this MLP alone (as the heads of Hydra, arXiv 2402.05109, section 3.1).
    """

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        n_embd = config.model.n_embd
        self.norm = RMSNorm(n_embd, config.model.norm_eps)
        self.mlp = MLP(n_embd, n_embd, 2 * n_embd)

    def forward(self, mask_hidden: Tensor, previous: Tensor) -> Tensor:
        """mask_hidden: (..., n_embd); previous: (..., n_embd), embedding of the token before each."""
        out: Tensor = mask_hidden + self.mlp(torch.cat([mask_hidden, self.norm(previous)], -1))
        return out


class ElaraLM(nn.Module):
    """The language model. `forward` gives hidden states; the heads are called in chunks by losses and decoding."""

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        self.config = config
        m = config.model
        self.embed = nn.Embedding(config.vocab_size, m.n_embd)
        self.blocks = nn.ModuleList(Block(config, moe=i in config.moe_layers) for i in range(m.n_layer))
        self.norm = RMSNorm(m.n_embd, m.norm_eps)
        untied = config.tidar.block_length and not config.tidar.tie_head
        self.diffusion = Linear(m.n_embd, config.vocab_size, bias=False) if untied else None
        self.chain = DraftChain(config) if config.tidar.block_length and config.tidar.chain else None
        self.packed_head: nn.Module | None = None  # the embedding's matrix once more, where `precision` packs it
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights; projections back into the residual stream scaled by 1/sqrt(2 * effective layers) (GPT-2)."""
        std = self.config.model.init_std
        residual = std / math.sqrt(2 * self.config.model.n_layer * self.config.trm.depth)
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                into_residual = name.endswith(("attention.out.weight", "down.weight", "experts.down"))
                nn.init.normal_(weight, std=residual if into_residual else std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        section: MaskSection | None = None,
        cache: KVCache | None = None,
        depth: int | None = None,
        exit_threshold: float | None = None,
        text: Text | None = None,
    ) -> Output:
        """Run the decoder.

        tokens: (batch, seq) ids, behind whatever `cache` holds. positions: (batch, seq), for RoPE only; default: behind
        the cache. section: mask tokens that see `tokens` and the cache but are seen by neither; on a cache they need
        room behind the tokens for this pass, and with anchor routing every block starts behind one of `tokens`. depth:
        recursion depth, default the trained one; with a cache it is the cache's. text: the tokens that loads and
        penalties of the routers count, None = all; what is computed of each token is the same.

        exit_threshold: for inference, end a block's recursion (order block) or the stack's (order stack) after the
        first pass that changes the state of every token here by less than this share of its norm. Passes left out get
        their keys and values from the state they were to begin with (CALM, arXiv 2207.07061, section 3.2). What comes
        out then depends on which tokens share a forward, and `routing` is empty.
        """
        batch, seq = tokens.shape
        depth = cache.depth if cache is not None else depth or self.config.trm.depth
        view = self._view(tokens, positions, section, cache)
        view.text = text
        ids = tokens if section is None else torch.cat([tokens, section.tokens], 1)
        x = self.embed(ids)
        x, choices = self._run_blocks(x, view, depth, exit_threshold)
        if cache is not None:
            cache.advance(seq)
        x = self.norm(x)
        mask_hidden = x[:, seq:] if section is not None else None
        penalty = sum((choice.penalty for choice in choices), start=x.new_zeros(()))
        mask = None if text is None else text.mask
        routing = RoutingStats(choices, penalty, batch, seq, self.config.moe.num_experts, depth, mask)
        return Output(x[:, :seq], mask_hidden, routing)

    def ar_head(self, hidden: Tensor) -> Tensor:
        """Logits of the next token, (..., vocab), from the embedding's weight."""
        return linear(hidden, self.embed.weight) if self.packed_head is None else self.packed_head(hidden)

    def diffusion_head(self, mask_hidden: Tensor, previous: Tensor | None = None) -> Tensor:
        """Logits of the token that a mask token stands for, (..., vocab); previous as in `chained`."""
        mask_hidden = self.chained(mask_hidden, previous)
        return self.ar_head(mask_hidden) if self.diffusion is None else self.diffusion(mask_hidden)

    def chained(self, mask_hidden: Tensor, previous: Tensor | None) -> Tensor:
        """What the diffusion head's matrix meets. previous: (...) ids of the tokens before, needed by `tidar.chain`."""
        if self.chain is None:
            return mask_hidden
        assert previous is not None
        chained: Tensor = self.chain(mask_hidden, self.embed(previous))
        return chained

    @property
    def diffusion_weight(self) -> Tensor:
        """The diffusion head's matrix, (vocab, n_embd)."""
        return self.embed.weight if self.diffusion is None else self.diffusion.weight

    def _view(
        self, tokens: Tensor, positions: Tensor | None, section: MaskSection | None, cache: KVCache | None
    ) -> View:
        seq, device = tokens.shape[1], tokens.device
        lengths = cache.lengths if cache is not None else [0]
        uniform = min(lengths) == max(lengths)
        if uniform:
            past = torch.full((1, 1), lengths[0], device=device)
        else:
            past = to_device(torch.tensor(lengths)[:, None], device)
        place = past + torch.arange(seq, device=device)  # index of each clean token among the keys
        where = place if positions is None else positions
        keys = max(lengths) + seq
        causal = keys == seq and seq > 1
        hidden_keys = not causal and (seq > 1 or not uniform)
        visible = (torch.arange(keys, device=device) <= place[..., None])[:, None] if hidden_keys else None
        chunks, drafts = [], None
        if section is not None:
            behind = to_device(section.positions(), device)
            rows = max(len(where), len(behind))
            where = torch.cat([where.expand(rows, -1), behind.expand(rows, -1)], 1)
            drafts = self._draft_routing(section, past, seq)
            if cache is None:
                chunks = section_chunks(section, keys, device)
            else:
                visible, causal = section_visible(section, place, keys), False
        cos, sin = rope_angles(where, self.config.head_dim, self.config.model.rope_base)
        cos, sin = cos.to(self.embed.weight.dtype), sin.to(self.embed.weight.dtype)
        return View(seq, cos, sin, visible, causal, chunks, cache, drafts)

    def _draft_routing(self, section: MaskSection, past: Tensor, seq: int) -> DraftRouting | None:
        """Where the masks take their experts from; past: (1 or rows, 1), tokens in the cache."""
        kind, length = self.config.tidar.draft_routing, section.block_length
        if kind == "token" or not self.config.moe_layers:
            return None
        starts = to_device(section.starts.view(-1, section.starts.shape[-1]), past.device)  # (1 or rows, blocks)
        if kind == "anchor":
            routed = starts - 1 - past
        else:
            routed = seq + torch.arange(starts.shape[1], device=past.device)[None]
        clean = torch.arange(seq, device=past.device).expand(len(routed), -1)
        source = torch.cat([clean, routed.repeat_interleave(length, 1)], 1)
        return DraftRouting(seq, length, source[0] if len(source) == 1 else source, kind == "anchor")

    def _run_blocks(
        self, x: Tensor, view: View, depth: int, exit_threshold: float | None
    ) -> tuple[Tensor, list[Choice]]:
        """Choices come back ordered by (physical MoE block, pass); with a threshold there are none."""
        count = len(self.blocks)
        if self.config.trm.order == "block":
            runs = [(i, [(p, i * depth + p) for p in range(depth)]) for i in range(count)]
        else:
            runs = [(i, [(p, p * count + i)]) for p in range(depth) for i in range(count)]
        if exit_threshold is not None:
            return self._run_until_settled(x, view, runs, exit_threshold), []
        recompute = self.config.trm.checkpoint and torch.is_grad_enabled() and view.cache is None
        found: dict[int, list[Choice]] = {i: [] for i in self.config.moe_layers}
        for i, layers in runs:
            block: Any = self.blocks[i]
            if recompute:
                x, choices = checkpoint(block, x, view, layers, use_reentrant=False)
            else:
                x, choices = block(x, view, layers)
            if choices:
                found[i] += choices
        return x, [choice for i in found for choice in found[i]]

    def _run_until_settled(
        self, x: Tensor, view: View, runs: list[tuple[int, list[tuple[int, int]]]], exit_threshold: float
    ) -> Tensor:
        """The blocks with early exit; runs: (block, its (recursion pass, effective layer) pairs)."""
        count = len(self.blocks)
        if self.config.trm.order == "block":
            for i, layers in runs:
                x, _ = self.blocks[i](x, view, layers, exit_threshold)
            return x
        for first in range(0, len(runs), count):  # of each pass
            before = x
            for i, layers in runs[first : first + count]:
                x, _ = self.blocks[i](x, view, layers)
            if settled(before, x, exit_threshold):
                for i in range(count):
                    block: Any = self.blocks[i]
                    block.skip(x, view, [layer for _, [(_, layer)] in runs[first + count + i :: count]])
                break
        return x
