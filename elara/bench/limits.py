"""What the machine can do at most, measured right behind the figure it is held against, and what a model asks of it."""

from __future__ import annotations

import torch
from torch import nn

from elara.bench.measure import Figure, Run, timed
from elara.model import ElaraLM
from elara.model.linear import linear
from elara.model.moe import Experts, MoE
from elara.training.callbacks.throughput import peak_flops

READ_BYTES = 1 << 28  # of the large read: eight times this CPU's last cache
SIDE = {"cpu": 1536, "cuda": 8192}  # of the square matrices
REPEATS = 5  # the best counts: a limit is what was possible once


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large read, by torch's threads: the better of a sum and a matrix times a vector."""
    large = torch.ones(READ_BYTES * (4 if device.type == "cuda" else 1) // 16384, 4096, device=device)
    vector = torch.ones(4096, device=device)
    reads: list[Run] = [lambda: large.sum(), lambda: large @ vector]
    seconds = min(timed(read) for read in reads for _ in range(REPEATS))
    return large.nbytes / seconds


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of one large square matrix product in `dtype`, by torch's threads."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: linear(a, b)) for _ in range(REPEATS))


def decode_bytes(model: ElaraLM) -> int:
    """Bytes of weights that one token must touch: every block once per recursion pass, of the experts the chosen ones.

    What a cache keeps from one pass to the next can lift a small model above the share that memory alone allows.
    """
    moe = model.config.moe
    blocks = sum(_bytes(module) for module in model.blocks)
    for module in model.modules():
        if isinstance(module, Experts):
            blocks -= _bytes(module) * (moe.num_experts - moe.top_k) // moe.num_experts
    head: nn.Module = model.embed if model.packed_head is None else model.packed_head
    return blocks * model.config.trm.depth + _bytes(head) + _bytes(model.norm)


def moe_flops(layer: MoE, tokens: int) -> float:
    """FLOPs of forward and backward through the routed experts: 6 per active weight and token."""
    active = layer.router.moe.top_k / layer.router.moe.num_experts
    return 6 * tokens * active * sum(p.numel() for p in layer.experts.parameters())


def against_bandwidth(
    figure: Figure, model: ElaraLM, tokens: int, *, target: float | None = None, limit: float | None = None
) -> Figure:
    """Note how near decoding comes to reading its weights once per token: `tokens` were written, one at a time.

    limit: bytes per second, where it is known already.
    """
    least = tokens * decode_bytes(model) / (limit or bandwidth(model.embed.weight.device))
    figure.limit, figure.share, figure.share_target = "memory bandwidth", least / figure.subject, target
    figure.tokens_per_second = tokens / figure.subject
    return figure


def against_matmul(
    figure: Figure, flops: float, tokens: int, device: torch.device, dtype: torch.dtype, *, limit: float | None = None
) -> Figure:
    """Note how near a step of `flops` over `tokens` comes to nothing but matrix products in `dtype`.

    limit: FLOP per second, where it is known already.
    """
    least = flops / (limit or matmul_rate(device, dtype))
    figure.limit, figure.share = "matmul", least / figure.subject
    figure.tokens_per_second = tokens / figure.subject
    peak = peak_flops(device)
    if peak is not None:
        figure.mfu = flops / figure.subject / peak
    return figure


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
