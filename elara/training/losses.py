"""The training objective: next-token cross entropy, plus a weighted diffusion loss on the mask section.

With teachers every head's loss becomes (1 - weight) * cross entropy + weight * temperature^2 * divergence from them
(Hinton et al., arXiv 1503.02531, section 2); where they have no opinion it stays the cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elara.config import TiDARConfig
from elara.device import to_device
from elara.model import ElaraLM, RoutingStats, Text, draw_section
from elara.model.linear import linear
from elara.training.divergence import coarse_logprobs, divergence

Parts = tuple[Tensor, Tensor]  # what is to be minimised, and the figures it is made of

IGNORE = -100  # target that no loss counts
ROWS = 256  # rows of logits alive at once for a large vocabulary: 256 x 50304 floats are 51 MB, not 400


@dataclass
class Opinion:
    """What a teacher says behind every token: the likeliest next tokens, and how likely all others are together.

    ids: (batch, seq, k); logprobs: (batch, seq, k + 1), the rest last, at the temperature of the `Lesson`.
    share: (batch), its part in the teachers' loss of each row; the shares of all teachers add up to 1.
    """

    teacher: str
    ids: Tensor
    logprobs: Tensor
    share: Tensor

    def at(self, places: Tensor) -> Opinion:
        """Behind the tokens at `places` (n) of every row only."""
        return Opinion(self.teacher, self.ids[:, places], self.logprobs[:, places], self.share)


@dataclass
class Lesson:
    """How teachers are listened to. kind: one of `divergence.KINDS`; weight: 0 = not at all, 1 = to nothing else."""

    opinions: Sequence[Opinion]
    kind: str = "forward_kl"
    temperature: float = 1.0
    weight: float = 0.5
    diffusion: bool = True  # the diffusion head learns from them too
    written: bool = False  # by the student itself: only what teachers say of it is learned


class Counts(NamedTuple):
    """What the means of a loss divide by, float scalars: targets of either head, and the text that routers meet."""

    ar: Tensor
    diffusion: Tensor
    text: Tensor


@dataclass
class Losses:
    """total = ar + loss_weight * diffusion + penalty, where teachers have no say; scalars in nats per token.

    ar, diffusion: cross entropies; diffusion is None without TiDAR. counts: what they were divided by. teachers:
    divergence by teacher, and of the diffusion head by teacher + "_diffusion".
    """

    total: Tensor
    ar: Tensor
    diffusion: Tensor | None
    penalty: Tensor
    routing: RoutingStats
    counts: Counts
    teachers: dict[str, Tensor] = field(default_factory=dict)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    count: Tensor | None = None,
    weights: Tensor | None = None,
    lesson: Lesson | None = None,
) -> Parts:
    """What a head is to minimise, and its figures: mean cross entropy, then each teacher's mean divergence, in nats.

    hidden: (batch, seq, n_embd); weight: (vocab, n_embd); targets: (batch, seq) ids, IGNORE is left out; count: scalar,
    what the means divide by, None = the targets; weights: (batch, seq) factors on each place's loss. The logits of a
    large vocabulary are made and let go `ROWS` at a time.
    """
    counted = targets != IGNORE
    count = counted.sum().float() if count is None else count
    scale = counted / count.clamp(min=1e-6)  # (batch, seq); without any target all are 0
    scale = (scale if weights is None else scale * weights).flatten()
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    opinions = [] if lesson is None else [_rows(opinion) for opinion in lesson.opinions]

    def parts(logits: Tensor, rows: slice) -> Parts:
        logprobs = logits.log_softmax(1)
        surprise = F.nll_loss(logprobs, targets[rows], ignore_index=IGNORE, reduction="none")
        total = ce = (surprise * scale[rows]).sum()
        figures = [ce.detach()]
        if lesson is not None:
            heeded = [share[rows] * (ids[rows] >= 0).any(1) for ids, _, share in opinions]  # 0 where it has no say
            text = 0 if lesson.written else 1 - lesson.weight * sum(heeded)  # how much the cross entropy counts
            total = (surprise * scale[rows] * text).sum()
            if lesson.temperature != 1:
                logprobs = (logits / lesson.temperature).log_softmax(1)
            for (ids, theirs, _), share in zip(opinions, heeded, strict=True):
                student = coarse_logprobs(logprobs, ids[rows])
                value = (divergence(student, theirs[rows], lesson.kind) * share * scale[rows]).sum()
                total = total + lesson.weight * lesson.temperature**2 * value
                figures.append(value.detach())
        return total, torch.stack(figures)

    if len(weight) <= 4096 or len(hidden) <= ROWS:
        return parts(linear(hidden, weight).float(), slice(None))
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    found: Parts = _Chunked.apply(hidden, weight, parts)
    return found


def _rows(opinion: Opinion) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and share with batch and places in one dimension."""
    seq = opinion.ids.shape[1]
    return opinion.ids.flatten(0, 1), opinion.logprobs.flatten(0, 1), opinion.share.repeat_interleave(seq)


class _Chunked(torch.autograd.Function):
    """Sums `parts` over all rows, ROWS of them at a time; gradients are made in the forward pass, as the logits die."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, parts: Callable[[Tensor, slice], Parts]) -> Parts:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        totals, figures = [], []
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            logits = linear(hidden[rows], weight).float().requires_grad_(need_hidden or need_weight)  # (ROWS, vocab)
            with torch.set_grad_enabled(need_hidden or need_weight):
                total, some = parts(logits, rows)
            totals.append(total.detach())
            figures.append(some)
            if grad_hidden is None and grad_weight is None:
                continue
            (grad,) = torch.autograd.grad(total, logits)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        sums = torch.stack(figures).sum(0)
        ctx.mark_non_differentiable(sums)
        return torch.stack(totals).sum(), sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
        )


def count_targets(
    tokens: Tensor, weights: Tensor | None, places: Tensor | None, tidar: TiDARConfig, pad_id: int = -1
) -> Tensor:
    """The `Counts` of one batch in one tensor, float32 (3).

    tokens, weights: as in `elara_loss`; places: (length) what the mask section stands for, None without one.
    """
    text = tokens != pad_id
    target = text if weights is None else text & (weights != 0)
    ar, met = target[:, 1:].sum(), text[:, :-1].sum()
    if places is None:
        return torch.stack([ar, torch.zeros_like(ar), met]).float()
    if tidar.draft_routing != "anchor":  # then no mask meets a router
        met = met + text[:, places].sum()
    return torch.stack([ar, target[:, places].sum(), met]).float()


def elara_loss(
    model: ElaraLM,
    tokens: Tensor,
    generator: torch.Generator,
    mask_id: int,
    *,
    depth: int | None = None,
    pad_id: int = -1,
    place: tuple[int, int] = (0, 1),
    counts: Counts | None = None,
    weights: Tensor | None = None,
    lesson: Lesson | None = None,
) -> Losses:
    """The loss of one batch.

    tokens: (batch, seq + 1) ids; the first seq are read, the last seq predicted; `pad_id` marks padding, which is read
    as token 0 and never a target. weights: (batch, seq + 1), what every token counts as a target; those of 0 are read
    only and not part of the mean. lesson: what teachers say of them. generator: on the CPU, draws the supervised blocks
    and hidden tokens. place: (rank, ranks) where `tokens` are one rank's rows of a global batch. counts: of a batch of
    which `tokens` are a part, divided by the number of its parts, so that the mean of the parts' losses is the loss of
    the whole; None = what is counted here.
    """
    config = model.config.tidar
    text = tokens != pad_id
    known = tokens.masked_fill(~text if weights is None else ~text | (weights == 0), IGNORE)
    inputs = tokens.masked_fill(~text, 0)[:, :-1]
    section = supervision = places = None
    if config.block_length:
        section, supervision = draw_section(inputs, config, mask_id, generator, place)
        places = to_device(section.positions()[0], inputs.device)
    if counts is None:
        counts = Counts(*count_targets(tokens, weights, places, config, pad_id).unbind())
    met = text[:, :-1] if places is None else torch.cat([text[:, :-1], text[:, places]], 1)
    output = model(inputs, section=section, depth=depth, text=Text(met, counts.text))
    total, (ar, *heard) = head_loss(
        output.hidden, model.embed.weight, known[:, 1:], count=counts.ar,
        weights=None if weights is None else weights[:, 1:], lesson=lesson,
    )  # fmt: skip
    names = [] if lesson is None else [opinion.teacher for opinion in lesson.opinions]
    teachers = dict(zip(names, heard, strict=True))
    total, diffusion = total + output.routing.penalty, None
    if supervision is not None and places is not None:
        factors = None if weights is None else weights[:, places]
        if supervision.weights is not None:
            factors = supervision.weights if factors is None else supervision.weights * factors
        silent = lesson is not None and lesson.written  # nothing to learn then, unless teachers speak to this head
        if lesson is not None:  # what they say about the token at a place stands behind the one before it
            heeded = [opinion.at(places - 1) for opinion in lesson.opinions] if lesson.diffusion else []
            lesson = replace(lesson, opinions=heeded) if heeded else None
        assert output.mask_hidden is not None
        mask_hidden = model.chained(output.mask_hidden, inputs[:, places - 1])
        to_minimise, (diffusion, *heard) = head_loss(
            mask_hidden, model.diffusion_weight, known[:, places],
            count=counts.diffusion, weights=factors, lesson=lesson,
        )  # fmt: skip
        teachers |= {f"{name}_diffusion": value for name, value in zip(names, heard, strict=False)}
        factor = 0.0 if silent and lesson is None else config.loss_weight  # of 0: DDP waits for every weight's gradient
        total = total + factor * to_minimise
    return Losses(total, ar, diffusion, output.routing.penalty, output.routing, counts, teachers)
