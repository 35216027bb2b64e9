"""Mixture of experts: routed experts chosen by a biased sigmoid router, plus an always-active shared one.

DeepSeekMoE (arXiv 2401.06066) with the balance of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a selection bias that
no gradient touches decides who is chosen, the unbiased scores decide how much each counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elara.config import ElaraConfig
from elara.model.mlp import MLP, swiglu

CLEAN, MASK = 0, 1  # sections, as indexed in RoutingStats.load

Weights = tuple[Tensor, Tensor]  # gate_up (experts, 2 hidden, n_embd), down (experts, n_embd, hidden)

ROW_MULTIPLE = 32  # oneDNN compiles a bf16 matmul per row count: padded counts repeat, raw ones hardly ever do


@dataclass
class RoutingStats:
    """What the routers of one forward pass did. Empty for a model without experts.

    load: float (moe layers, passes, sections, experts), tokens sent to each expert.
    penalty: scalar, the weighted auxiliary losses (0 when none is switched on).
    """

    load: Tensor
    penalty: Tensor


@dataclass
class Choice:
    """experts and gates: (tokens, top_k); load: (sections, experts); penalty: scalar."""

    experts: Tensor
    gates: Tensor
    load: Tensor
    penalty: Tensor


class Router(nn.Module):
    """Linear -> sigmoid scores -> top-k of (score + selection bias) -> gates renormalised to sum 1. Always float32."""

    selection_bias: Tensor

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        self.moe = config.moe
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.model.n_embd))
        self.register_buffer("selection_bias", torch.zeros(config.moe.num_experts))

    def forward(self, x: Tensor, seq: int) -> Choice:
        """x: (batch, seq + section, n_embd); the first `seq` tokens of each row are clean."""
        experts, top_k = self.moe.num_experts, self.moe.top_k
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)  # (batch, total, experts)
        scores = logits.sigmoid()
        chosen = (scores.detach() + self.selection_bias).topk(top_k, dim=-1).indices
        gates = scores.gather(-1, chosen)
        gates = gates / gates.sum(-1, keepdim=True) * self.moe.gate_scale
        load = torch.zeros(2 * experts, device=x.device)
        slot = chosen.clone()
        slot[:, seq:] += experts
        load.scatter_add_(0, slot.flatten(), load.new_ones(slot.numel()))
        penalty = self._penalty(logits, scores, chosen)
        return Choice(chosen.view(-1, top_k), gates.view(-1, top_k), load.view(2, experts), penalty)

    def _penalty(self, logits: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        total = scores.new_zeros(())
        if self.moe.balance_loss:
            share = scores / scores.sum(-1, keepdim=True)
            counts = F.one_hot(chosen, self.moe.num_experts).sum(2).float().mean(1)  # (batch, experts)
            frequency = counts * self.moe.num_experts / self.moe.top_k
            total = total + self.moe.balance_loss * (frequency * share.mean(1)).sum(-1).mean()
        if self.moe.z_loss:
            total = total + self.moe.z_loss * logits.logsumexp(-1).square().mean()
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
        count, top_k = len(weights[0]), choice.experts.shape[1]
        x = x.to(weights[0].dtype)
        flat = choice.experts.flatten()  # (tokens * top_k)
        order = flat.argsort(stable=True)
        rows = choice.load.sum(0).long()  # (experts)
        grouped = x.is_cuda and x.dtype == torch.bfloat16
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
            ys = _by_expert(xs, weights, sizes, count)
        picked = _Collect.apply(ys, slot).view(-1, top_k, ys.shape[1])
        return (picked * choice.gates.to(ys.dtype).unsqueeze(-1)).sum(1)


def _by_expert(xs: Tensor, weights: Weights, sizes: list[int], count: int) -> Tensor:
    # unbind has one backward for the stack; W[e] would make a full-size zero gradient for every expert
    gate_up, down = weights[0].unbind(0), weights[1].unbind(0)
    skip_idle = not torch.is_grad_enabled()
    parts = [
        F.linear(swiglu(F.linear(part, gate_up[e])), down[e])
        for e, part in enumerate(xs.split(sizes))
        if sizes[e] or not (skip_idle or count > 64)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


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
        return grad.index_select(0, slot).view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class _Collect(torch.autograd.Function):
    """picked[i] = ys[slot[i]] with all slots distinct, so the backward is a copy, not an addition."""

    @staticmethod
    def forward(ctx: Any, ys: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.rows = len(ys)
        return ys.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slot,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, slot, grad), None


class MoE(nn.Module):
    """Router, routed experts and the ungated shared expert."""

    def __init__(self, config: ElaraConfig) -> None:
        super().__init__()
        n_embd, hidden = config.model.n_embd, config.expert_hidden
        self.router = Router(config)
        self.experts = Experts(n_embd, hidden, config.moe.num_experts)
        self.shared = MLP(n_embd, hidden * config.moe.num_shared) if config.moe.num_shared else None

    def forward(self, x: Tensor, seq: int, weights: Weights) -> tuple[Tensor, Choice]:
        """x: (batch, seq + section, n_embd). Returns the layer's output and what the router chose."""
        choice = self.router(x, seq)
        y = self.experts(x.flatten(0, 1), choice, weights).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, choice
