"""Sampled TiDAR follows the AR distribution: chi-square tests that fail when the acceptance rule is broken."""

from __future__ import annotations

import itertools

import pytest
import torch

from elara.decoding import SamplingConfig
from elara.decoding.sampling import draw, probabilities
from elara.decoding.tidar import Draft, draft, verify
from elara.model import MaskSection

VOCAB, NEW, ROWS, MASK_ID = 4, 4, 2000, 3


def chi_square_p(counts, expected):
    """Probability of counts at least this far from expected; cells below 5 are pooled."""
    counts, expected = counts.double(), expected.double()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    used = expected > 0
    if (counts[~used] > 0).any():
        return 0.0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    freedom = torch.tensor((int(used.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def ar_distribution(model, prompt, sampling):
    """Probability of every continuation of NEW tokens, from the whole text without a cache."""
    result = torch.empty(VOCAB**NEW, dtype=torch.float64)
    texts = list(itertools.product(range(VOCAB), repeat=NEW))
    with torch.no_grad():
        hidden = model(torch.tensor([prompt + list(text) for text in texts])).hidden
        probs = probabilities(model.ar_head(hidden), sampling)
    for i, text in enumerate(texts):
        steps = [probs[i, len(prompt) - 1 + at, token] for at, token in enumerate(text)]
        result[i] = torch.stack(steps).prod()
    return result


def p_value(model, write, sampling, mode="tidar"):
    prompt = [1, 2]
    texts, _ = write(model, [prompt] * ROWS, sampling, mode=mode, mask_id=MASK_ID)
    index = torch.tensor(texts) @ torch.tensor([VOCAB ** (NEW - 1 - i) for i in range(NEW)])
    counts = torch.bincount(index, minlength=VOCAB**NEW)
    return chi_square_p(counts, ROWS * ar_distribution(model, prompt, sampling))


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(3, vocab_size=VOCAB, init_std=1.1, depth=2)


SAMPLINGS = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.6},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.3, "top_p": 0.85},
    "short drafts": {"temperature": 1.0, "draft_length": 2},
}


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_sampled_tidar_follows_the_ar_distribution(model, write, options):
    assert p_value(model, write, SamplingConfig(max_new_tokens=NEW, **options)) > 1e-3


def test_drafts_are_accepted_and_rejected_here(model, write):
    """Else the tests of the distribution would show little."""
    _, steps = write(
        model, [[1, 2]] * 500, SamplingConfig(max_new_tokens=NEW, temperature=1.0, mode="tidar"), mask_id=MASK_ID
    )
    drafted = sum(sum(step.drafted) for step in steps)
    accepted = sum(sum(step.accepted) for step in steps)
    assert 0.3 < accepted / drafted < 0.9


def test_sampled_ar_follows_its_distribution(model, write):
    assert p_value(model, write, SamplingConfig(max_new_tokens=NEW, temperature=1.0), mode="ar") > 1e-3


def accept_everything(probs, drafted, limit, uniform):
    rows = torch.arange(len(probs))
    return limit, draw(probs[rows, limit - 1], uniform[:, -1])


def forget_the_residual(probs, drafted, limit, uniform):
    accepted, _ = verify(probs, drafted, limit, uniform)
    return accepted, draw(probs[torch.arange(len(probs)), accepted - 1], uniform[:, -1])


def accept_by_p_alone(probs, drafted, limit, uniform):
    """u < p instead of u < p / q: rejects too often, then corrects by a residual that does not fit."""
    sure = Draft(drafted.tokens, torch.ones_like(drafted.proposal))
    accepted, _ = verify(probs, sure, limit, uniform)
    _, behind = verify(probs, drafted, accepted, uniform)
    return accepted, behind


@pytest.mark.parametrize("broken", [accept_everything, forget_the_residual, accept_by_p_alone])
def test_the_test_fails_for_a_broken_acceptance_rule(model, write, monkeypatch, broken):
    monkeypatch.setattr("elara.decoding.generation.verify", broken)
    assert p_value(model, write, SamplingConfig(max_new_tokens=NEW, temperature=1.0)) < 1e-6


def test_verify_gives_each_place_its_own_distribution():
    """Fixed distributions that differ from place to place: what stands, continued by plain draws, follows p."""
    rows, length = 30_000, 4
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(length, VOCAB, generator=generator)).softmax(-1)
    q = (2 * torch.randn(length - 1, VOCAB, generator=generator)).softmax(-1)
    proposal = q.expand(rows, -1, -1)
    drawn = draw(proposal, torch.rand(rows, length - 1, generator=generator))
    first = torch.zeros(rows, 1, dtype=torch.long)
    limit = torch.randint(1, length + 1, (rows,), generator=generator)
    drafted = Draft(torch.cat([first, drawn], 1), proposal)
    accepted, behind = verify(p.expand(rows, -1, -1), drafted, limit, torch.rand(rows, length, generator=generator))
    assert ((accepted >= 1) & (accepted <= limit)).all()
    texts = draw(p.expand(rows, -1, -1), torch.rand(rows, length, generator=generator))
    for place in range(length):
        stands, next_one = place < accepted - 1, place == accepted - 1
        texts[stands, place] = drawn[stands, place] if place < length - 1 else 0
        texts[next_one, place] = behind[next_one]
    index = texts @ torch.tensor([VOCAB ** (length - 1 - i) for i in range(length)])
    joint = torch.einsum("a,b,c,d->abcd", *p.double()).flatten()
    assert chi_square_p(torch.bincount(index, minlength=VOCAB**length), rows * joint) > 1e-3


def test_drafts_come_from_the_masks_behind_the_text(make_model, write, monkeypatch):
    """Every proposal equals that of a whole forward: text, then one block of masks at its end."""
    model = make_model(depth=2)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1]]
    proposals = []

    def keep(*args, **options):
        proposals.append(draft(*args, **options))
        return proposals[-1]

    monkeypatch.setattr("elara.decoding.generation.draft", keep)
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0, mode="tidar")
    _, steps = write(model, prompts, sampling, mask_id=10)
    texts = [list(prompt) for prompt in prompts]
    seen = set()
    for step, made in zip(steps, proposals, strict=True):
        for row, text in enumerate(texts):
            text += step.tokens[row]
            seen.add(step.accepted[row])
            if step.finished[row]:
                continue
            assert int(made.tokens[row, 0]) == text[-1]
            section = MaskSection(torch.tensor([len(text) - 1]), 4, torch.full((1, 4), 10))
            with torch.no_grad():
                output = model(torch.tensor([text[:-1]]), section=section)
            whole = probabilities(model.diffusion_head(output.mask_hidden[:, 1:]), sampling)
            torch.testing.assert_close(made.proposal[row], whole[0], rtol=0, atol=1e-10)
    assert {0, 1, 2} <= seen  # different groups were used
