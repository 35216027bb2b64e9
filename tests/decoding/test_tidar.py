"""Sampled TiDAR follows the AR distribution: chi-square tests that fail when the acceptance rule is broken."""

from __future__ import annotations

import itertools

import pytest
import torch

from elara.decoding import Controller, Costs, SamplingConfig
from elara.decoding.controller import candidates
from elara.decoding.sampling import draw, probabilities
from elara.decoding.tidar import Draft, Plan, draft, verify
from elara.model import MaskSection

VOCAB, NEW, ROWS, MASK_ID = 4, 4, 1000, 3


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


def p_value(model, write, sampling, mode="tidar", rows=ROWS, **options):
    prompt = [1, 2]
    texts, _ = write(model, [prompt] * rows, sampling, mode=mode, mask_id=MASK_ID, **options)
    index = torch.tensor(texts) @ torch.tensor([VOCAB ** (NEW - 1 - i) for i in range(NEW)])
    counts = torch.bincount(index, minlength=VOCAB**NEW)
    return chi_square_p(counts, rows * ar_distribution(model, prompt, sampling))


class Changing(Controller):
    """Another plan at every step: lengths, groups and plain steps as no real costs would mix them."""

    def plan(self, *, drafted):
        wheel = [Plan(4, (1, 4), 4), Plan(2, (2,), 2), Plan(3, (), 0), Plan(1, (1,), 3), Plan(4, (1, 2, 3, 4), 4)]
        self.turn = getattr(self, "turn", -1) + 1
        return wheel[self.turn % len(wheel)]

    def observe(self, plan, rows):
        pass


@pytest.fixture(scope="module")
def costs():
    return Costs({(plan.length, len(plan.groups), plan.masks): 1.0 for plan in candidates(4)})


@pytest.fixture(scope="module")
def models(make_model):
    """Untrained, but neither sure of one text nor of all alike, and with drafts that stand about every second time."""
    return {
        False: make_model(3, vocab_size=VOCAB, init_std=1.1, depth=2),
        True: make_model(4, vocab_size=VOCAB, init_std=0.4, depth=2, chain=True),
    }


@pytest.fixture(scope="module")
def model(models):
    return models[False]


SAMPLINGS = {
    "plain": {"temperature": 1.0},
    "cool": {"temperature": 0.7, "top_k": 3},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.3, "top_p": 0.85},
    "short drafts": {"temperature": 1.0, "draft_length": 2},
    "few groups": {"temperature": 1.0, "groups": 1},
}


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_sampled_tidar_follows_the_ar_distribution(model, write, options):
    assert p_value(model, write, SamplingConfig(max_new_tokens=NEW, **options)) > 1e-3


@pytest.mark.parametrize("kind", [Changing, Controller])
def test_under_a_controller_and_with_a_chain_too(models, write, costs, kind):
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.7, top_k=3)
    assert p_value(models[True], write, sampling, controller=kind(costs)) > 1e-3


@pytest.mark.slow
@pytest.mark.thorough(4, "long")
@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("pace", [None, 1, Changing, Controller])
def test_sampled_tidar_follows_the_ar_distribution_over_many_texts(models, write, costs, chain, temperature, pace):
    """pace: groups of a fixed plan, or who plans."""
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=temperature, top_k=3, seed=10_000)
    options = {"controller": pace(costs)} if isinstance(pace, type) else {}
    sampling.groups = pace if isinstance(pace, int) else None
    assert p_value(models[chain], write, sampling, rows=3000, **options) > 1e-3


@pytest.mark.parametrize("chain", [False, True])
def test_drafts_are_accepted_and_rejected_here(models, write, chain):
    """Else the tests of the distribution would show little."""
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=1.0, mode="tidar")
    _, steps = write(models[chain], [[1, 2]] * 300, sampling, mask_id=MASK_ID)
    drafted = sum(sum(step.drafted) for step in steps)
    accepted = sum(sum(step.accepted) for step in steps)
    assert 0.3 < accepted / drafted < 0.9


def test_sampled_ar_follows_its_distribution(model, write):
    assert p_value(model, write, SamplingConfig(max_new_tokens=NEW, temperature=1.0), mode="ar") > 1e-3


def accept_everything(probs, drafted, uniform, trusted=None):
    return len(probs), int(draw(probs[-1], uniform[-1]))


def forget_the_residual(probs, drafted, uniform, trusted=None):
    count, _ = verify(probs, drafted, uniform)
    return count, int(draw(probs[count - 1], uniform[-1]))


def accept_by_p_alone(probs, drafted, uniform, trusted=None):
    """u < p instead of u < p / q: rejects too often, then corrects by a residual that does not fit."""
    count, _ = verify(probs, Draft(drafted.tokens, torch.ones_like(drafted.proposal)), uniform)
    if count == len(probs):
        return count, int(draw(probs[-1], uniform[-1]))
    return count, int(draw((probs[count - 1] - drafted.proposal[count - 1]).clamp(min=0) + 1e-9, uniform[-1]))


def trust_a_little(probs, drafted, uniform, trusted=None):
    """What `trust` does: likely drafts stand without a trial."""
    return verify(probs, drafted, uniform, probs[:-1] >= 0.5 * probs[:-1].amax(1, keepdim=True))


def misremember(*args):
    """Drafts that come with other proposals than those that drew them."""
    return [Draft(made.tokens, None if made.proposal is None else made.proposal.roll(1, 0)) for made in draft(*args)]


BROKEN = [
    ("verify", accept_everything),
    ("verify", forget_the_residual),
    ("verify", accept_by_p_alone),
    ("verify", trust_a_little),
    ("draft", misremember),
]


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_the_test_fails_for_a_broken_acceptance_rule(model, write, monkeypatch, name, broken):
    monkeypatch.setattr(f"elara.decoding.engine.{name}", broken)
    assert p_value(model, write, SamplingConfig(max_new_tokens=NEW, temperature=1.0)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_the_test_fails_for_a_broken_rule_with_a_chain(models, write, monkeypatch, name, broken):
    monkeypatch.setattr(f"elara.decoding.engine.{name}", broken)
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.7, top_k=3)
    assert p_value(models[True], write, sampling, rows=3000) < 1e-6


def test_trust_is_lossy(model, write):
    assert p_value(model, write, SamplingConfig(max_new_tokens=NEW, temperature=1.0, trust=0.5)) < 1e-6


def test_verify_gives_each_place_its_own_distribution():
    """Fixed distributions that differ from place to place: what stands, continued by plain draws, follows p."""
    rows, length = 6000, 4
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(length, VOCAB, generator=generator)).softmax(-1)
    q = (2 * torch.randn(length - 1, VOCAB, generator=generator)).softmax(-1)
    drawn = draw(q.expand(rows, -1, -1), torch.rand(rows, length - 1, generator=generator)).tolist()
    uniform = torch.rand(rows, length, generator=generator)
    texts = draw(p.expand(rows, -1, -1), torch.rand(rows, length, generator=generator))
    for text, tokens, numbers in zip(texts, drawn, uniform, strict=True):
        limit = 1 + int(torch.randint(length, (), generator=generator))
        count, behind = verify(p[:limit], Draft(tokens, q).cut(limit - 1), numbers[:limit])
        assert 1 <= count <= limit
        text[:count] = torch.tensor([*tokens[: count - 1], behind])
    index = texts @ torch.tensor([VOCAB ** (length - 1 - i) for i in range(length)])
    joint = torch.einsum("a,b,c,d->abcd", *p.double()).flatten()
    assert chi_square_p(torch.bincount(index, minlength=VOCAB**length), rows * joint) > 1e-3


@pytest.mark.parametrize("options", [{}, {"draft_routing": "block", "chain": True}, {"draft_routing": "anchor"}])
def test_drafts_come_from_the_masks_behind_the_text(make_model, write, monkeypatch, options):
    """Every proposal equals that of a whole forward: text, then one block of masks at its end."""
    model = make_model(depth=2, **options)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1]]
    proposals = []  # by row, seeded as they are numbered; of every step

    def keep(model, last, group, samplings, generators, allowed):
        drafts = draft(model, last, group, samplings, generators, allowed)
        proposals.append({each.initial_seed(): made for each, made in zip(generators, drafts, strict=True)})
        return drafts

    monkeypatch.setattr("elara.decoding.engine.draft", keep)
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0, mode="tidar")
    _, steps = write(model, prompts, sampling, mask_id=10)
    texts = [list(prompt) for prompt in prompts]
    seen = set()
    assert len(proposals) <= len(steps)  # nothing is proposed behind the last tokens
    for i, step in enumerate(steps):
        made = proposals[i] if i < len(proposals) else {}
        for row, text in enumerate(texts):
            text += step.tokens[row]
            seen.add(step.accepted[row])
            if row not in made:
                assert len(text) - len(prompts[row]) >= 15  # no draft where there is no token left for it
                continue
            section = MaskSection(torch.tensor([len(text) - 1]), 4, torch.full((1, 4), 10))
            with torch.no_grad():
                masks = model(torch.tensor([text[:-1]]), section=section).mask_hidden[0, 1:]
                before = torch.tensor([text[-1], *made[row].tokens[:-1]])
                whole = probabilities(model.diffusion_head(masks, before), sampling)
            torch.testing.assert_close(made[row].proposal, whole, rtol=0, atol=1e-10)
    assert {0, 1, 2} <= seen  # different groups were used
