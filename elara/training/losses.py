"""The training objective: next-token cross entropy, plus a weighted diffusion loss on the mask section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elara.device import to_device
from elara.model import ElaraLM, RoutingStats, draw_section
from elara.model.linear import linear

Average = Callable[[Tensor], Tensor]

IGNORE = -100  # target that no loss counts
ROWS = 256  # rows of logits alive at once for a large vocabulary: 256 x 50304 floats are 51 MB, not 400


@dataclass
class Losses:
    """total = ar + loss_weight * diffusion + penalty; scalars in nats per token. diffusion is None without TiDAR."""

    total: Tensor
    ar: Tensor
    diffusion: Tensor | None
    penalty: Tensor
    routing: RoutingStats


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, weights: Tensor | None = None, over_ranks: Average | None = None
) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T` in nats, without keeping the logits of a large vocabulary.

    hidden: (rows, n_embd); weight: (vocab, n_embd); targets: (rows) ids, IGNORE is left out of the mean;
    weights: (rows) factors on each row's loss, which do not change what the mean divides by. over_ranks: averages the
    number of targets over ranks, so that the mean of their losses is the mean over all targets of all of them.
    """
    count = (targets != IGNORE).sum()
    count = (count if over_ranks is None else over_ranks(count.float())).clamp(min=1)
    if len(weight) <= 4096 or len(hidden) <= ROWS:
        loss = F.cross_entropy(linear(hidden, weight).float(), targets, ignore_index=IGNORE, reduction="none")
        loss = loss if weights is None else loss * weights
        return loss.sum() / count
    scale = (targets != IGNORE).float() if weights is None else weights * (targets != IGNORE)
    scale = scale / count
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, scale)
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum(scale * cross entropy), ROWS rows at a time; gradients are made in the forward pass, as the logits die."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            target = targets[rows].clamp(min=0)
            logits = linear(hidden[rows], weight).float()  # (ROWS, vocab)
            norm = logits.logsumexp(1)
            total += ((norm - logits.gather(1, target[:, None])[:, 0]) * scale[rows]).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.sub_(norm[:, None]).exp_()
            grad.scatter_add_(1, target[:, None], -torch.ones_like(norm)[:, None])
            grad = (grad * scale[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def elara_loss(
    model: ElaraLM,
    tokens: Tensor,
    generator: torch.Generator,
    mask_id: int,
    *,
    depth: int | None = None,
    pad_id: int = -1,
    place: tuple[int, int] = (0, 1),
    over_ranks: Average | None = None,
    weights: Tensor | None = None,
) -> Losses:
    """The loss of one batch.

    tokens: (batch, seq + 1) ids; the first seq are read, the last seq predicted; `pad_id` marks padding, which is read
    as token 0 and never a target. weights: (batch, seq + 1), what every token counts as a target; those of 0 are read
    only and not part of the mean. generator: on the CPU, draws the supervised blocks and hidden tokens. place: (rank,
    ranks) where `tokens` are one rank's rows of a global batch; over_ranks as in `cross_entropy`.
    """
    config = model.config.tidar
    pad = tokens == pad_id
    known = tokens.masked_fill(pad if weights is None else pad | (weights == 0), IGNORE)
    ar_targets, ar_weights = known[:, 1:], None if weights is None else weights[:, 1:].flatten()
    inputs = tokens.masked_fill(pad, 0)[:, :-1]
    section = supervision = None
    if config.block_length:
        section, supervision = draw_section(inputs, config, mask_id, generator, place)
    output = model(inputs, section=section, depth=depth)
    ar = cross_entropy(
        output.hidden.flatten(0, 1), model.embed.weight, ar_targets.flatten(), weights=ar_weights, over_ranks=over_ranks
    )
    total, diffusion = ar + output.routing.penalty, None
    if section is not None and supervision is not None:
        places = to_device(section.positions()[0], inputs.device)
        targets = known[:, places]
        factors = None if weights is None else weights[:, places]
        if supervision.weights is not None:
            factors = supervision.weights if factors is None else supervision.weights * factors
        assert output.mask_hidden is not None
        mask_hidden = model.chained(output.mask_hidden, inputs[:, places - 1]).flatten(0, 1)
        diffusion = cross_entropy(
            mask_hidden, model.diffusion_weight, targets.flatten(),
            weights=None if factors is None else factors.flatten(), over_ranks=over_ranks,
        )  # fmt: skip
        total = total + config.loss_weight * diffusion
    return Losses(total, ar, diffusion, output.routing.penalty, output.routing)
