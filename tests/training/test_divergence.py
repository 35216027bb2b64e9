"""The divergences and their gradients against dense float64 sums over the partition of the vocabulary."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from elara.training.divergence import KINDS, coarse_logprobs, divergence


def dense(logits: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the partition, from the softmax of the whole vocabulary. (rows, k + 1)"""
    probabilities = logits.double().softmax(1)
    top = probabilities.gather(1, ids)
    inside = torch.zeros_like(probabilities).scatter(1, ids, 1)
    return torch.cat([top, (probabilities * (1 - inside)).sum(1, keepdim=True)], 1)


def reference(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Of probabilities, in float64: p the teacher's, q the student's."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(1)

    if kind == "forward_kl":
        return kl(p, q)
    return kl(q, p) if kind == "reverse_kl" else (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def pair(vocab: int, k: int, sharp: float = 1.0, rows: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's logits, the teacher's k likeliest ids."""
    generator = torch.Generator().manual_seed(vocab + k)
    student, teacher = (torch.randn(rows, vocab, generator=generator) * sharp for _ in range(2))
    return student, teacher, teacher.topk(k).indices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "k", "sharp"), [(50, 1, 1.0), (50, 8, 4.0), (50, 49, 1.0), (4000, 32, 3.0)])
def test_values_and_gradients_against_float64(kind: str, vocab: int, k: int, sharp: float) -> None:
    student, teacher, ids = pair(vocab, k, sharp)
    target = dense(teacher, ids)
    wanted = student.double().requires_grad_()
    loss = reference(target, dense(wanted, ids), kind)
    (expected,) = torch.autograd.grad(loss.sum(), wanted)
    student.requires_grad_()
    value = divergence(coarse_logprobs(student.log_softmax(1), ids), target.log().float(), kind)
    (found,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(value.double(), loss, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_known_is_the_divergence_of_the_whole_vocabulary(kind: str) -> None:
    student, teacher, ids = pair(40, 40)
    target = torch.cat([teacher.log_softmax(1).gather(1, ids), torch.full((7, 1), -torch.inf)], 1)
    expected = reference(teacher.double().softmax(1), student.double().softmax(1), kind)
    value = divergence(coarse_logprobs(student.log_softmax(1), ids), target, kind)
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_knowing_fewer_tokens_never_raises_it(kind: str) -> None:
    student, teacher, _ = pair(60, 60, 2.0)
    values = []
    for k in (1, 4, 16, 60):
        ids = teacher.topk(k).indices
        target = dense(teacher, ids).log().float()
        values.append(divergence(coarse_logprobs(student.log_softmax(1), ids), target, kind))
    assert all((a <= b + 1e-5).all() for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_distribution_is_zero_and_pulls_nowhere(kind: str) -> None:
    logits, _, _ = pair(60, 8, 3.0)
    ids = logits.topk(8).indices
    logits.requires_grad_()
    value = divergence(coarse_logprobs(logits.log_softmax(1), ids), dense(logits.detach(), ids).log().float(), kind)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.detach().abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_certainty_on_either_side_stays_finite(kind: str) -> None:
    student, teacher, ids = pair(60, 8)
    for a, b in ((student * 1e3, teacher), (student, teacher * 1e3), (student * 1e3, teacher * 1e3)):
        logits = a.clone().requires_grad_()
        target = dense(b, ids).log().float()
        value = divergence(coarse_logprobs(logits.log_softmax(1), ids), target, kind)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_places_without_a_token_change_nothing(kind: str) -> None:
    student, teacher, ids = pair(60, 8, 2.0)
    target = dense(teacher, ids).log().float()
    none = torch.full((7, 3), -1)
    longer = torch.cat([ids[:, :4], none, ids[:, 4:]], 1)
    more = torch.cat([target[:, :4], torch.full((7, 3), -torch.inf), target[:, 4:]], 1)
    found = []
    for chosen, wanted in ((ids, target), (longer, more)):
        logits = student.clone().requires_grad_()
        value = divergence(coarse_logprobs(logits.log_softmax(1), chosen), wanted, kind)
        found.append((value, *torch.autograd.grad(value.sum(), logits)))
    torch.testing.assert_close(found[0], found[1])
    logits = student.clone().requires_grad_()
    unsaid = torch.tensor([[-torch.inf] * 3 + [0.0]] * 7)
    nothing = divergence(coarse_logprobs(logits.log_softmax(1), none), unsaid, kind)
    assert nothing.detach().abs().max() < 1e-6
    assert torch.autograd.grad(nothing.sum(), logits)[0].abs().max() < 1e-6


def test_the_gradient_of_the_partition_passes_gradcheck() -> None:
    logits = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.tensor([[1, 4], [0, 10], [7, 3]])
    assert torch.autograd.gradcheck(lambda x: coarse_logprobs(x, ids), (logits,))
