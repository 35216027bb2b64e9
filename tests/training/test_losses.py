"""The losses against dense float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elara.config import ElaraConfig, ModelConfig, TiDARConfig
from elara.model import ElaraLM, draw_section
from elara.training.losses import elara_loss

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
