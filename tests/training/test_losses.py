"""The losses against dense float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elara.config import ElaraConfig, ModelConfig, TiDARConfig
from elara.model import ElaraLM, draw_section
from elara.training.divergence import KINDS
from elara.training.losses import Lesson, Opinion, elara_loss

MASK, PAD = 60, -1


def small_model(tidar: TiDARConfig, vocab: int = 64) -> ElaraLM:
    torch.manual_seed(3)
    model = ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=48, vocab_size=vocab, context_length=32)
    return ElaraLM(replace(ElaraConfig(), model=model, tidar=tidar))


def rows(seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(0, 50, (12, 33), generator=torch.Generator().manual_seed(seed))
    tokens[1, 20:], tokens[3, 5:] = PAD, PAD
    return tokens


@pytest.mark.parametrize("vocab", [64, 4160])  # dense logits, logits in chunks
@pytest.mark.parametrize("tidar", [
    TiDARConfig(), TiDARConfig(block_length=4), TiDARConfig(block_length=4, schedule="cosine", block_fraction=0.5),
])  # fmt: skip
def test_weights_of_targets_against_dense_formulas(tidar: TiDARConfig, vocab: int) -> None:
    model, tokens = small_model(tidar, vocab), rows()
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2))
    weights[weights < 0.3] = 0
    losses = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK, weights=weights)
    inputs = tokens.clamp(min=0)[:, :-1]
    section = supervision = None
    if tidar.block_length:
        section, supervision = draw_section(inputs, tidar, MASK, torch.Generator().manual_seed(1))
    output = model(inputs, section=section)

    def mean(logits: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor, counted: torch.Tensor) -> float:
        surprise = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return float((surprise.detach() * factors)[counted].sum() / counted.sum())

    counted = (tokens != PAD) & (weights > 0)
    expected = mean(model.ar_head(output.hidden), tokens[:, 1:], weights[:, 1:], counted[:, 1:])
    assert losses.ar.item() == pytest.approx(expected, rel=1e-5)
    if section is None or supervision is None:
        assert losses.diffusion is None
        return
    at = section.positions()[0]
    factors = weights[:, at] if supervision.weights is None else weights[:, at] * supervision.weights
    assert output.mask_hidden is not None and losses.diffusion is not None
    logits = model.diffusion_head(model.chained(output.mask_hidden, inputs[:, at - 1]))
    assert losses.diffusion.item() == pytest.approx(mean(logits, tokens[:, at], factors, counted[:, at]), rel=1e-5)


def test_a_token_of_weight_zero_is_read_and_not_learned() -> None:
    model, tokens = small_model(TiDARConfig(block_length=4)), rows()
    weights = torch.ones(tokens.shape)
    weights[:, 10:14] = 0

    def losses(changed: int) -> list[float]:
        other = tokens.clone()
        other[0, 12] = changed
        found = elara_loss(model, other[:, :14], torch.Generator().manual_seed(1), MASK, weights=weights[:, :14])
        assert found.diffusion is not None
        return [found.ar.item(), found.diffusion.item()]

    assert losses(3) == losses(4)  # nothing behind it, so what is read does not matter either
    model.zero_grad()
    everything = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK)
    ones = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK, weights=torch.ones(tokens.shape))
    assert torch.equal(everything.total, ones.total)


def opinion(name: str, seed: int, share: torch.Tensor, vocab: int, temperature: float) -> tuple[Opinion, torch.Tensor]:
    """A random teacher's word on `rows()`, and its probabilities of all tokens at the temperature, (12, 32, vocab)."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = (3 * torch.randn(12, 32, vocab, generator=generator) / temperature).log_softmax(-1)
    top, ids = logprobs.topk(5)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return Opinion(name, ids, torch.cat([top, rest], -1), share), logprobs.double().exp()


@pytest.mark.parametrize("vocab", [64, 4160])
@pytest.mark.parametrize("kind", KINDS)
def test_teachers_against_dense_formulas(kind: str, vocab: int) -> None:
    model, tokens, temperature = small_model(TiDARConfig(block_length=4), vocab), rows(), 1.7
    share = torch.rand(12, generator=torch.Generator().manual_seed(5))
    made = [opinion("a", 6, share, vocab, temperature), opinion("b", 7, 1 - share, vocab, temperature)]
    lesson = Lesson([each for each, _ in made], kind, temperature, weight=0.3)
    model.zero_grad()
    losses = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK, lesson=lesson)
    losses.total.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.zero_grad()
    inputs = tokens.clamp(min=0)[:, :-1]
    section, _ = draw_section(inputs, model.config.tidar, MASK, torch.Generator().manual_seed(1))
    output = model(inputs, section=section)
    at = section.positions()[0]
    assert output.mask_hidden is not None
    heads = {
        "": (model.ar_head(output.hidden), torch.arange(32), tokens[:, 1:]),
        "_diffusion": (
            model.diffusion_head(model.chained(output.mask_hidden, inputs[:, at - 1])), at - 1, tokens[:, at]
        ),
    }
    total = torch.zeros((), dtype=torch.float64)
    for suffix, (logits, places, targets) in heads.items():
        counted = targets != PAD
        surprise = -logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        loss = 0.7 * surprise[counted].mean()
        for each, probabilities in made:
            p, q = probabilities[:, places], (logits.double() / temperature).softmax(-1)
            ids = each.ids[:, places]
            p, q = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q))
            middle = (p + q) / 2
            value = {
                "forward_kl": (p * (p / q).log()).sum(-1),
                "reverse_kl": (q * (q / p).log()).sum(-1),
                "jensen_shannon": ((p * (p / middle).log() + q * (q / middle).log()) / 2).sum(-1),
            }[kind]
            value = (value * each.share[:, None])[counted].mean()
            assert losses.teachers[each.teacher + suffix].item() == pytest.approx(value.item(), rel=1e-4)
            loss = loss + 0.3 * temperature**2 * value
        total = total + loss * (0.5 if suffix else 1)
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_a_teacher_may_leave_the_diffusion_head_alone() -> None:
    model, tokens = small_model(TiDARConfig(block_length=4)), rows()
    heard, _ = opinion("a", 6, torch.ones(12), 64, 1.0)
    plain = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK)
    half = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK, lesson=Lesson([heard], diffusion=False))
    assert half.diffusion is not None and plain.diffusion is not None
    assert set(half.teachers) == {"a"}
    assert half.total.item() == pytest.approx(
        (half.ar.item() + half.teachers["a"].item()) / 2 + 0.5 * plain.diffusion.item(), rel=1e-5
    )
