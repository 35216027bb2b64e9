"""How far a student is from a teacher of whom only the k likeliest tokens are known, and the mass of all others.

Both distributions are seen through the same partition of the vocabulary, the teacher's k tokens one by one and the
rest as one, so every divergence here is exact for that partition and, by the data processing inequality, a lower
bound of the one over the whole vocabulary; with k = vocabulary they are equal.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
LOWEST = -50.0  # log-probabilities below count as this: 2e-22, and no infinity in a difference


def coarse_logprobs(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens `ids` and, last, of all others together.

    logprobs: (rows, vocab) float32, of all tokens; ids: (rows, k), -1 = no token, without any probability. Returns
    (rows, k + 1).
    """
    value: Tensor = _Coarse.apply(logprobs, ids)
    return value


class _Coarse(torch.autograd.Function):
    """The rest is summed, not what the others leave of 1; one matrix is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, ids: Tensor) -> Tensor:
        at = ids.clamp(min=0)
        top = logprobs.gather(1, at).masked_fill(ids < 0, -torch.inf)
        rest = logprobs.exp()  # (rows, vocab)
        first = rest[:, 0].masked_fill((ids == 0).any(1), 0.0)  # which -1 stands in for
        rest.scatter_(1, at, 0.0)[:, 0] = first
        mass = rest.sum(1, keepdim=True)
        ctx.save_for_backward(rest, mass, ids)
        return torch.cat([top, mass.log()], 1).clamp(min=LOWEST)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rest, mass, ids = ctx.saved_tensors
        spread = rest * (grad[:, -1:] / mass.clamp(min=math.exp(LOWEST)))
        return spread.scatter_add_(1, ids.clamp(min=0), grad[:, :-1].masked_fill(ids < 0, 0.0)), None


def divergence(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Divergence of each row in nats; student, teacher: (rows, outcomes) log-probabilities that sum to 1.

    kind: forward_kl = KL(teacher || student), covers all that the teacher says; reverse_kl = KL(student || teacher),
    says nothing that the teacher would not (MiniLLM, arXiv 2306.08543); jensen_shannon, between them (GKD,
    arXiv 2306.13649, eq. 1 with beta 0.5).
    """
    teacher = teacher.clamp(min=LOWEST)
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return (_kl(teacher, middle) + _kl(student, middle)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(1)
