"""Mixture of experts: routed experts chosen by a biased sigmoid router, plus an always-active shared one.

DeepSeekMoE (arXiv 2401.06066) with the balance of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a selection bias that
no gradient touches decides who is chosen, the unbiased scores decide how much each counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elara.config import ElaraConfig
from elara.model.linear import linear
from elara.model.mlp import MLP, swiglu

CLEAN, MASK = 0, 1  # sections, as indexed in RoutingStats.load

Weights = tuple[Tensor, Tensor]  # gate_up (experts, 2 hidden, n_embd), down (experts, n_embd, hidden)

FEW_TOKENS = 96  # up to here a CPU's inference goes the short way, without padding and bookkeeping for gradients
ROW_MULTIPLE = 32  # oneDNN compiles a bf16 matmul per row count: padded counts repeat, raw ones hardly ever do


@dataclass
class Text:
    """Which tokens of a forward pass are text: the others are padding, which counts nowhere.

    mask: bool, (batch, seq + section). count: scalar, what a mean over the text that a router meets divides by.
    """

    mask: Tensor
    count: Tensor


@dataclass
class Choice:
    """What one router chose. experts, gates: (tokens, top_k); penalty: scalar, its weighted auxiliary losses."""

    experts: Tensor
    gates: Tensor
    penalty: Tensor


@dataclass
class DraftRouting:
    """How the mask section finds its experts when a block shares one choice (`tidar.draft_routing` block or anchor).

    seq: clean tokens, before the section. length: masks per block. source: which routed token each token takes its
    choice from, (tokens) or (batch, tokens). anchor: only clean tokens are routed, the masks of a block take the choice
    of the last one before it; else every block is routed once, by the mean score of its masks.
    """

    seq: int
    length: int
    source: Tensor
    anchor: bool

    def routed(self, x: Tensor) -> Tensor:
        """The tokens that meet the router, of (batch, tokens, n_embd)."""
        return x[:, : self.seq] if self.anchor else x

    def pooled(self, scores: Tensor) -> Tensor:
        """Scores with one row for each block, of (batch, routed tokens, experts)."""
        if self.anchor:
            return scores
        blocks = scores[:, self.seq :].unflatten(1, (-1, self.length)).mean(2)
        return torch.cat([scores[:, : self.seq], blocks], 1)

    def spread(self, chosen: Tensor) -> Tensor:
        """Every token's own row, of (batch, routed, top_k)."""
        if self.source.dim() == 1:
            return chosen.index_select(1, self.source)
        return chosen.gather(1, self.source[..., None].expand(-1, -1, chosen.shape[2]))


@dataclass
class RoutingStats:
    """What the routers of one forward pass did.

    choices: of every MoE layer and recursion pass, passes innermost; empty for a model without experts.
    rows, seq: batch rows and clean tokens of each. experts, passes: how many there are.
    penalty: scalar, the sum of the weighted auxiliary losses; 0 when none is switched on.
    text: which tokens count, bool (rows, seq + section); None = all.
    """

    choices: list[Choice]
    penalty: Tensor
    rows: int
    seq: int
    experts: int
    passes: int
    text: Tensor | None = None

    @cached_property
    def load(self) -> Tensor:
        """Text sent to each expert, float tokens (moe layers, passes, sections, experts); counted when first asked."""
        if not self.choices:
            return torch.zeros(0, self.passes, 2, 0)
        chosen = torch.stack([choice.experts for choice in self.choices])  # (layers * passes, tokens, top_k)
        layers = len(chosen)
        place = chosen.view(layers, self.rows, -1, chosen.shape[-1]).clone()
        place[:, :, self.seq :] += self.experts
        place += torch.arange(layers, device=place.device).view(-1, 1, 1, 1) * 2 * self.experts
        load = torch.zeros(layers * 2 * self.experts, device=place.device)
        counted = load.new_ones(()).expand(place.numel())
        if self.text is not None:
            counted = self.text[..., None].to(load.dtype).expand_as(place).flatten()
        load.scatter_add_(0, place.flatten(), counted)
        return load.view(-1, self.passes, 2, self.experts)


class Router(nn.Module):
    """Linear -> sigmoid scores -> top-k of (score + selection bias) -> gates renormalised to sum 1. Always float32.

    selection_bias: (passes, experts). The passes of a block meet different hidden states: balancing only their sum
    would leave each of them lopsided.
    """

    selection_bias: Tensor

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        self.moe = config.moe
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.model.n_embd))
        self.register_buffer("selection_bias", torch.zeros(config.trm.max_depth, config.moe.num_experts))

    def forward(
        self, x: Tensor, recursion: int = 0, drafts: DraftRouting | None = None, text: Text | None = None
    ) -> Choice:
        """x: (batch, tokens, n_embd); recursion: the pass, from 0. Passes deeper than trained use the last one's bias.

        drafts: how masks share a choice, None = every token has its own. text: the tokens that are penalised, None =
        all. The gates of each token sum to `moe.gate_scale`.
        """
        top_k = self.moe.top_k
        if drafts is not None:
            x = drafts.routed(x)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)  # (batch, routed, experts)
        scores = logits.sigmoid()
        if drafts is not None:
            scores = drafts.pooled(scores)
        bias = self.selection_bias[min(recursion, len(self.selection_bias) - 1)]
        chosen = (scores.detach() + bias).topk(top_k, dim=-1).indices
        gates = scores.gather(-1, chosen)
        gates = gates / gates.sum(-1, keepdim=True) * self.moe.gate_scale
        penalty = self._penalty(logits, scores, drafts, text)
        if drafts is not None:
            chosen, gates = drafts.spread(chosen), drafts.spread(gates)
        return Choice(chosen.view(-1, top_k), gates.view(-1, top_k), penalty)

    def _penalty(self, logits: Tensor, scores: Tensor, drafts: DraftRouting | None, text: Text | None) -> Tensor:
        """The weighted auxiliary losses. logits: (batch, routed, experts); scores: pooled, where drafts share them."""
        total = scores.new_zeros(())
        if not self.moe.balance_loss and not self.moe.z_loss:
            return total
        mask = logits.new_ones(logits.shape[:2])  # (batch, routed)
        if text is not None:
            mask = (text.mask if drafts is None else drafts.routed(text.mask)).to(mask.dtype)

        if self.moe.balance_loss:
            scored = mask if drafts is None else drafts.pooled(mask[..., None])[..., 0].ceil()  # blocks with any text
            part = (scored / scored.sum(1, keepdim=True).clamp(min=1))[..., None]  # of its sequence
            share = (scores / scores.sum(-1, keepdim=True) * part).sum(1)  # (batch, experts)
            chosen = scores.topk(self.moe.top_k, dim=-1).indices  # without the bias (DeepSeek-V3, eq. 18)
            counts = (torch.zeros_like(scores).scatter_(-1, chosen, 1.0) * part).sum(1)
            frequency = counts * self.moe.num_experts / self.moe.top_k
            sequences = scored.any(1).sum().clamp(min=1)
            total = total + self.moe.balance_loss * (frequency * share).sum() / sequences

        if self.moe.z_loss:
            squares = (logits.logsumexp(-1).square() * mask).sum()
            total = total + self.moe.z_loss * squares / (mask.sum() if text is None else text.count.clamp(min=1e-6))
        return total


class Experts(nn.Module):
    """SwiGLU experts as stacked tensors; each token meets only the experts chosen for it.

    Tokens are sorted by expert, every expert does one matmul per projection on its rows, and the results are gathered
    back. On a GPU in bf16 the matmuls are one grouped kernel and the host never waits for the counts.
    """

    def __init__(self, n_embd: int, hidden: int, count: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(count, 2 * hidden, n_embd))
        self.down = nn.Parameter(torch.empty(count, n_embd, hidden))

    def weights(self, device_type: str) -> Weights:
        """Both stacks in the dtype that autocast asks for: cast once, used by every recursion pass."""
        if not torch.is_autocast_enabled(device_type):
            return self.gate_up, self.down
        dtype = torch.get_autocast_dtype(device_type)
        return self.gate_up.to(dtype), self.down.to(dtype)

    def forward(self, x: Tensor, choice: Choice, weights: Weights) -> Tensor:
        """x: (tokens, n_embd) -> (tokens, n_embd): the gate-weighted sum over each token's experts."""
        x = x.to(weights[0].dtype)
        if len(x) <= FEW_TOKENS and x.device.type == "cpu" and not torch.is_grad_enabled():
            return self._decode(x, choice, weights)
        count, top_k = len(weights[0]), choice.experts.shape[1]
        flat = choice.experts.flatten()  # (tokens * top_k)
        order = flat.argsort(stable=True)
        rows = flat.new_zeros(count).scatter_add_(0, flat, torch.ones_like(flat))  # per expert
        grouped = _takes_groups(x)
        padded = rows
        if not grouped and x.dtype == torch.bfloat16:
            padded = (rows + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
        ends, filled = padded.cumsum(0), rows.cumsum(0)
        shift = ((ends - padded) - (filled - rows))[flat[order]]
        place = shift + torch.arange(len(flat), device=x.device)  # row of each sorted (token, expert) pair
        slot = torch.empty_like(order).index_copy_(0, order, place)
        sizes = [] if grouped else padded.tolist()
        source = order.new_zeros(len(flat) if grouped else sum(sizes)).index_copy_(0, place, order // top_k)
        xs = _Dispatch.apply(x, source, slot)  # (rows, n_embd), sorted by expert
        if grouped:
            ys = _grouped(xs, weights, ends.to(torch.int32))
        else:
            ys = _by_expert(xs, weights, sizes)
        y: Tensor = _Combine.apply(ys, slot, choice.gates)
        return y

    def expert(self, index: int, x: Tensor, weights: Weights) -> Tensor:
        """One expert on its rows, (rows, n_embd) -> (rows, n_embd)."""
        return linear(swiglu(linear(x, weights[0][index])), weights[1][index])

    def _decode(self, x: Tensor, choice: Choice, weights: Weights) -> Tensor:
        """What a decoding step needs: every expert that is chosen at all is read once, for all of its rows."""
        if len(x) == 1:
            (first, gate), *rest = zip(choice.experts[0].tolist(), choice.gates[0].tolist(), strict=True)
            total = self.expert(first, x, weights).mul_(gate)
            for e, gate in rest:
                total.add_(self.expert(e, x, weights), alpha=gate)
            return total
        flat = choice.experts.flatten()  # (tokens * top_k)
        order = flat.argsort(stable=True)
        sizes = torch.bincount(flat, minlength=len(weights[0])).tolist()
        source = order // choice.experts.shape[1]
        rows = x.index_select(0, source).split(sizes)
        parts = [self.expert(e, part, weights) for e, part in enumerate(rows) if sizes[e]]
        gates = choice.gates.flatten().index_select(0, order).to(x.dtype)
        return torch.zeros_like(x).index_add_(0, source, torch.cat(parts).mul_(gates[:, None]))


def _takes_groups(x: Tensor) -> bool:
    """Whether one kernel does all experts of a layer: on a GPU in bf16."""
    return x.is_cuda and x.dtype == torch.bfloat16


def _by_expert(xs: Tensor, weights: Weights, sizes: list[int]) -> Tensor:
    # unbind has one backward for the stack; W[e] would make a full-size zero gradient for every expert
    gate_up, down = weights[0].unbind(0), weights[1].unbind(0)
    parts = [
        linear(swiglu(linear(part, gate_up[e])), down[e])
        for e, part in enumerate(xs.split(sizes))
        if sizes[e] or torch.is_grad_enabled()  # an idle expert still gets its zero gradient
    ]
    return torch.cat(parts)


def _grouped(xs: Tensor, weights: Weights, ends: Tensor) -> Tensor:
    gate_up, down = weights
    hidden = torch._grouped_mm(xs, gate_up.transpose(1, 2), offs=ends)
    return torch._grouped_mm(swiglu(hidden), down.transpose(1, 2), offs=ends)


class _Dispatch(torch.autograd.Function):
    """xs[row] = x[source[row]]; its backward gathers each token's rows by `slot` instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.tokens = len(x)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot,) = ctx.saved_tensors
        return _total(grad.index_select(0, slot).view(ctx.tokens, -1, grad.shape[1])), None, None


class _Combine(torch.autograd.Function):
    """y[token] = sum of ys[slot] * gate over the token's slots, all distinct: the backward copies instead of adding."""

    @staticmethod
    def forward(ctx: Any, ys: Tensor, slot: Tensor, gates: Tensor) -> Tensor:
        picked = ys.index_select(0, slot).view(*gates.shape, -1)  # (tokens, top_k, n_embd)
        ctx.save_for_backward(picked, slot, gates)
        ctx.rows = len(ys)
        return _total(picked, gates.to(ys.dtype)[..., None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        picked, slot, gates = ctx.saved_tensors
        grad = grad[:, None]
        rows = (grad * gates.to(grad.dtype)[..., None]).flatten(0, 1)
        grad_ys = grad.new_zeros(ctx.rows, grad.shape[2]).index_copy_(0, slot, rows)
        return grad_ys, None, (grad * picked).sum(-1).to(gates.dtype)


def _total(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """Sum of x or x * factor over axis 1, which is short: torch's sum takes 4-8 times as long on a CPU in bf16."""
    first, *rest = x.unbind(1)
    if factor is None:
        return sum(rest, start=first)
    first_factor, *factors = factor.unbind(1)
    total = first * first_factor
    for part, by in zip(rest, factors, strict=True):
        total.addcmul_(part, by)
    return total


class MoE(nn.Module):
    """Router, routed experts and the ungated shared expert."""

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        n_embd, hidden = config.model.n_embd, config.expert_hidden
        self.router = Router(config)
        self.experts = Experts(n_embd, hidden, config.moe.num_experts)
        self.shared = MLP(n_embd, hidden * config.moe.num_shared) if config.moe.num_shared else None

    def forward(
        self, x: Tensor, weights: Weights, recursion: int = 0,
        drafts: DraftRouting | None = None, text: Text | None = None,
    ) -> tuple[Tensor, Choice]:
        """x: (batch, tokens, n_embd); recursion: the pass; drafts: how a mask section is routed; text: what counts.

        Returns the layer's output and what the router chose.
        """
        choice = self.router(x, recursion, drafts, text)
        y = self.experts(x.flatten(0, 1), choice, weights).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, choice
