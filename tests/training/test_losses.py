"""The losses against dense float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
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


@pytest.mark.parametrize("vocab", [64, 4160])
@pytest.mark.parametrize("tidar", [TiDARConfig(), TiDARConfig(block_length=4)], ids=["ar", "diffusion"])
def test_of_what_the_student_wrote_only_what_teachers_say_is_learned(tidar: TiDARConfig, vocab: int) -> None:
    model, tokens = small_model(tidar, vocab), rows()

    def learned(heard: list[Opinion]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        lesson = Lesson(heard, weight=1.0, written=True)
        losses = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK, lesson=lesson)
        losses.total.backward()
        assert all(p.grad is not None for p in model.parameters())  # DDP waits for all of them
        return losses.total.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    half = torch.full((12,), 0.5)
    (speaks, _), (other, _) = opinion("a", 6, half, vocab, 1.0), opinion("b", 7, half, vocab, 1.0)
    silent = replace(other, ids=torch.full_like(other.ids, -1))
    total, gradients = learned([replace(speaks, ids=silent.ids), silent])
    assert total == 0 and not any(gradient.any() for gradient in gradients)

    total, gradients = learned([speaks, silent])  # where one is silent, the other has only its own share
    expected, wanted = learned([speaks])
    assert total == pytest.approx(expected, rel=1e-6) and total > 0
    for found, gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


def test_without_a_teacher_of_drafts_what_the_student_wrote_teaches_them_nothing() -> None:
    model, tokens = small_model(TiDARConfig(block_length=4)), rows()
    heard, _ = opinion("a", 6, torch.ones(12), 64, 1.0)
    lesson = Lesson([heard], weight=1.0, diffusion=False, written=True)
    losses = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK, lesson=lesson)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(losses.teachers["a"].item(), rel=1e-6)
    assert model.diffusion is not None and model.diffusion.weight.grad is not None  # DDP waits for it
    assert not model.diffusion.weight.grad.any()


def routed_model(**tidar: object) -> ElaraLM:
    torch.manual_seed(3)
    sizes = ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=48, vocab_size=64, context_length=32, init_std=0.2)
    moe = MoEConfig(num_experts=4, every=1, balance_loss=0.3, z_loss=0.2)
    model = ElaraLM(ElaraConfig(sizes, moe, TRMConfig(depth=2), TiDARConfig(**tidar)))  # type: ignore[arg-type]
    for name, bias in model.named_buffers():
        if name.endswith("selection_bias"):
            bias += torch.randn(bias.shape, generator=torch.Generator().manual_seed(4)) / 10
    return model


def test_padding_counts_neither_in_loads_nor_in_penalties() -> None:
    """A batch with padding against its rows, each cut where its text ends."""
    model, tokens = routed_model(), rows()
    tokens[5:, 9:], tokens[7] = PAD, PAD
    found = elara_loss(model, tokens, torch.Generator(), MASK).routing
    load, balance, z, count, filled = torch.zeros_like(found.load), 0.0, 0.0, 0, 0
    for row in tokens:
        text = row[:-1][row[:-1] != PAD]  # the last one of a window is not read
        if not len(text):
            continue
        alone = model(text[None]).routing
        load += alone.load
        model.config.moe.z_loss = 0.0
        even = model(text[None]).routing.penalty.item()
        model.config.moe.z_loss = 0.2
        balance, z = balance + even, z + (alone.penalty.item() - even) * len(text)
        count, filled = count + len(text), filled + 1
    assert torch.equal(found.load, load)
    assert found.penalty.item() == pytest.approx(balance / filled + z / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["token", "block", "anchor"])
def test_masks_that_stand_for_padding_do_not_count(kind: str) -> None:
    model, tokens = routed_model(block_length=4, block_fraction=0.7, draft_routing=kind), rows()
    met: list[tuple[torch.Tensor, torch.Tensor]] = []  # what every router read, and its matrix
    for name, router in model.named_modules():
        if name.endswith("router"):
            router.register_forward_hook(lambda module, args, out: met.append((args[0], module.weight)))
    found = elara_loss(model, tokens, torch.Generator().manual_seed(1), MASK).routing
    section, _ = draw_section(
        tokens.clamp(min=0)[:, :-1], model.config.tidar, MASK, torch.Generator().manual_seed(1)
    )
    text = torch.cat([tokens[:, :-1], tokens[:, section.positions()[0]]], 1) != PAD
    assert not text[:, 32:].all() and text[:, 32:].any()

    for index, choice in enumerate(found.choices):
        experts = choice.experts.view(12, -1, 2)
        for part, (one, other) in enumerate(((0, 32), (32, None))):
            wanted = experts[:, one:other][text[:, one:other]].flatten().bincount(minlength=4).float()
            assert torch.equal(found.load[index // 2, index % 2, part], wanted)

    penalty = 0.0
    for x, weight in met:
        logits = (x.double() @ weight.double().T).detach()
        scores = logits.sigmoid()
        z = logits.exp().sum(-1).log() ** 2
        squares, balance = list[float](), list[float]()
        for row in range(12):
            here = scored = text[row]
            values = scores[row]
            if kind == "anchor":
                here, scored, values = here[:32], scored[:32], values[:32]
            if kind == "block":
                scored = torch.cat([here[:32], here[32:].unflatten(0, (-1, 4)).any(1)])
                values = torch.cat([values[:32], values[32:].unflatten(0, (-1, 4)).mean(1)])
            squares += z[row, : len(here)][here].tolist()
            values = values[scored]
            chosen = values.topk(2).indices.flatten().bincount(minlength=4) / len(values)
            share = (values / values.sum(-1, keepdim=True)).mean(0)
            balance.append(float((chosen * 4 / 2 * share).sum()))
        penalty += 0.3 * sum(balance) / 12 + 0.2 * sum(squares) / len(squares)
    assert found.penalty.item() == pytest.approx(penalty, rel=1e-5)
