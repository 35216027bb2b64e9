"""The fast model against the slow reference: forward, routing and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from elara.model import CLEAN, MASK, ElaraLM, MaskSection, draw_section

MASK_ID = 12
TOLERANCE = 2e-6  # rope angles are float32 in the model and exact in the reference

CASES = {
    "dense": {"num_experts": 0},
    "dense, all heads": {"num_experts": 0, "n_kv_head": None},
    "moe": {},
    "moe, one kv head, bias": {"n_kv_head": 1, "bias": True},
    "moe without shared expert": {"num_shared": 0, "gate_scale": 1.7},
    "moe, two shared, top 3 of 5": {"num_experts": 5, "top_k": 3, "num_shared": 2},
    "moe everywhere, penalties": {"every": 1, "balance_loss": 0.3, "z_loss": 0.2},
    "depth 2, block order": {"depth": 2},
    "depth 2, stack order": {"depth": 2, "order": "stack"},
    "depth 3, block order, dense": {"depth": 3, "num_experts": 0},
    "depth 3, stack order": {"depth": 3, "order": "stack", "balance_loss": 0.1},
    "depth 2, checkpoint": {"depth": 2, "checkpoint": True},
    "depth 2, stack, checkpoint": {"depth": 2, "order": "stack", "checkpoint": True},
    "tied diffusion head": {"tie_head": True},
    "block length 1": {"block_length": 1},
    "anchor routing": {"draft_routing": "anchor", "depth": 2, "balance_loss": 0.3, "z_loss": 0.2},
    "anchor routing, stack order": {"draft_routing": "anchor", "depth": 2, "order": "stack", "checkpoint": True},
    "block routing": {"draft_routing": "block", "depth": 2},
}


def draw(config, tokens, seed=0):
    return draw_section(tokens, config.tidar, MASK_ID, torch.Generator().manual_seed(seed))[0]


def objective(model, hidden, mask_hidden, penalty):
    """A scalar that every parameter has a part in, and that depends on each output in its own way."""
    logits = model.ar_head(hidden)
    total = (logits * torch.cos(torch.arange(logits.numel()).view_as(logits))).sum() + penalty
    if mask_hidden is not None:
        logits = model.diffusion_head(mask_hidden)
        total = total + (logits * torch.sin(torch.arange(logits.numel()).view_as(logits))).sum()
    return total


def assert_near(got, want, name=""):
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{name} {text}")


def compare(model, reference, tokens, section=None, depth=None):
    """Forward, loads, penalty and gradients of the model against the reference's."""
    parameters = dict(model.named_parameters())
    output = model(tokens, section=section, depth=depth)
    loss = objective(model, output.hidden, output.mask_hidden, output.routing.penalty)
    gradients: list[Any] = list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=section is None))

    starts = None if section is None else section.starts.expand(len(tokens), -1).tolist()
    expected = reference.forward(
        model.config,
        parameters | dict(model.named_buffers()),
        tokens,
        starts=starts,
        section_tokens=None if section is None else section.tokens,
        depth=depth,
    )
    assert_near(output.hidden, expected.hidden)
    if section is None:
        assert output.mask_hidden is None
    else:
        assert_near(output.mask_hidden, expected.mask_hidden)
    penalty = torch.zeros((), dtype=torch.float64)
    for layer, passes in enumerate(expected.routed.values()):
        for index, routed in enumerate(passes):
            assert torch.equal(output.routing.load[layer, index], routed.load)
            penalty = penalty + routed.penalty
    assert_near(output.routing.penalty, penalty)
    mask_hidden = None if section is None else expected.mask_hidden
    loss = objective(model, expected.hidden, mask_hidden, penalty)
    wanted: list[Any] = list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=section is None))
    for name, got, want in zip(parameters, gradients, wanted, strict=True):
        if want is None:
            assert got is None, name
            continue
        scale = float(want.abs().max()) + 1e-9
        assert_near(got / scale, want / scale, name)


@pytest.mark.thorough(7, "slow")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_matches_the_reference(make_model, reference, options):
    model = make_model(**options)
    tokens = torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(1))
    compare(model, reference, tokens, draw(model.config, tokens))


@pytest.mark.parametrize("options", [{}, {"num_experts": 0, "depth": 2}, {"order": "stack", "depth": 2}])
def test_matches_the_reference_without_a_section(make_model, reference, options):
    model = make_model(**options)
    compare(model, reference, torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("order", ["block", "stack"])
def test_runs_at_another_depth_than_trained(make_model, reference, depth, order):
    model = make_model(depth=2, order=order)
    tokens = torch.randint(12, (1, 7), generator=torch.Generator().manual_seed(3))
    compare(model, reference, tokens, draw(model.config, tokens), depth=depth)


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.25, 0.6])
def test_matches_the_reference_on_a_fraction_of_the_blocks(make_model, reference, seed, fraction):
    model = make_model(block_fraction=fraction)
    tokens = torch.randint(12, (2, 14), generator=torch.Generator().manual_seed(seed))
    section = draw(model.config, tokens, seed)
    assert section.length < 14
    compare(model, reference, tokens, section)


def test_matches_the_reference_with_other_starts_in_every_row(make_model, reference):
    model = make_model()
    tokens = torch.randint(12, (3, 8), generator=torch.Generator().manual_seed(5))
    starts = torch.tensor([[1, 4], [3, 8], [2, 2]])  # a block may stand behind the last token, or twice at one place
    section = MaskSection(starts, 3, torch.full((3, 6), MASK_ID))
    compare(model, reference, tokens, section)


def test_matches_the_reference_with_clean_tokens_inside_the_section(make_model, reference):
    model = make_model(schedule="linear")
    tokens = torch.randint(12, (2, 10), generator=torch.Generator().manual_seed(6))
    section = draw(model.config, tokens)
    assert (section.tokens == MASK_ID).any()
    assert (section.tokens != MASK_ID).any()
    compare(model, reference, tokens, section)


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize("options", [{}, {"n_kv_head": 1}, {"n_kv_head": None, "depth": 2}], ids=str)
@pytest.mark.parametrize("kept", [0, 1 << 21], ids=["torch's attention", "our backward"])
def test_chunks_change_nothing(make_model, reference, monkeypatch, options, kept):
    """More clean tokens and a longer section than one chunk takes, with borders that cut unevenly."""
    model = make_model(block_length=2, **options)
    tokens = torch.randint(12, (2, 16), generator=torch.Generator().manual_seed(7))
    section = draw(model.config, tokens)
    for name in ("attention", "attention_cpu"):
        monkeypatch.setattr(f"elara.model.{name}.CHUNK", 5)  # two blocks of two to a chunk
    monkeypatch.setattr("elara.model.attention.KEPT_LIMIT", kept)
    compare(model, reference, tokens, section)


def test_rows_with_blocks_of_their_own(make_model, reference, monkeypatch):
    monkeypatch.setattr("elara.model.attention_cpu.CHUNK", 5)
    model = make_model(block_length=2)
    tokens = torch.randint(12, (2, 12), generator=torch.Generator().manual_seed(7))
    starts = torch.tensor([[1, 3, 5, 7], [2, 5, 8, 10]])
    compare(model, reference, tokens, MaskSection(starts, 2, torch.full((2, 8), MASK_ID)))


def test_bf16_training_stays_near_float32(make_model):
    """Loss and gradients under autocast, which computes attention in bf16 from end to end."""
    model = make_model(depth=2, context_length=256).float()
    tokens = torch.randint(12, (2, 200), generator=torch.Generator().manual_seed(3))
    section, found = draw(model.config, tokens), {}
    for narrow in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            output = model(tokens, section=section)
            assert output.mask_hidden is not None
            loss = objective(model, output.hidden.float(), output.mask_hidden.float(), output.routing.penalty)
        weights = [p for name, p in model.named_parameters() if "attention" in name]
        found[narrow] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    assert torch.cosine_similarity(found[True], found[False], dim=0) > 0.99


def test_real_chunk_size_is_crossed(make_model):
    """300 blocks of 4 need several chunks; each block alone must give the same."""
    model = make_model(block_length=4, context_length=2048)
    tokens = torch.randint(12, (1, 400), generator=torch.Generator().manual_seed(8))
    starts = torch.arange(1, 301)
    section = MaskSection(starts, 4, torch.full((1, 1200), MASK_ID))
    with torch.no_grad():
        together = model(tokens, section=section).mask_hidden.view(300, 4, -1)
        for block in (0, 63, 64, 65, 128, 299):
            one = MaskSection(starts[block : block + 1], 4, torch.full((1, 4), MASK_ID))
            torch.testing.assert_close(model(tokens, section=one).mask_hidden[0], together[block], rtol=0, atol=1e-10)


def test_mask_tokens_never_influence_clean_ones(make_model):
    model = make_model(depth=2)
    tokens = torch.randint(12, (2, 12), generator=torch.Generator().manual_seed(9))
    section = draw(model.config, tokens)
    other = dataclasses.replace(section, tokens=torch.randint(12, section.tokens.shape))
    with torch.no_grad():
        alone = model(tokens)
        for given in (section, other):
            output = model(tokens, section=given)
            torch.testing.assert_close(output.hidden, alone.hidden, rtol=0, atol=1e-12)
            assert torch.equal(output.routing.load[:, :, CLEAN], alone.routing.load[:, :, CLEAN])
            assert output.routing.load[:, :, MASK].sum() == 2 * section.tokens.numel() * 2  # passes, top 2


def test_a_block_sees_exactly_the_tokens_before_its_start_and_itself(make_model):
    """Gradients of one block's output with respect to the embedded tokens are zero elsewhere and nowhere else."""
    model = make_model(num_experts=0, block_length=3)
    tokens = torch.randint(12, (1, 12), generator=torch.Generator().manual_seed(10))
    section = MaskSection(torch.tensor([2, 5, 8]), 3, torch.full((1, 9), MASK_ID))
    embedded = []

    def keep(module, args, out):
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    model.embed.register_forward_hook(keep)
    output = model(tokens, section=section)
    for block, start in enumerate((2, 5, 8)):
        (gradient,) = torch.autograd.grad(
            output.mask_hidden[:, 3 * block : 3 * block + 3].sum(), embedded[0], retain_graph=True
        )
        touched = gradient[0].abs().sum(-1) > 0
        expected = [*range(start), *range(12 + 3 * block, 12 + 3 * block + 3)]
        assert touched.nonzero().flatten().tolist() == expected
    (gradient,) = torch.autograd.grad(output.hidden[:, 6].sum(), embedded[0])
    assert (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == list(range(7))


def test_initial_loss_is_the_logarithm_of_the_vocabulary(make_config):
    torch.manual_seed(0)
    config = make_config(init_std=0.02, n_embd=64, vocab_size=200)
    model = ElaraLM(config)
    tokens = torch.randint(200, (4, 33))
    logits = model.ar_head(model(tokens[:, :-1]).hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(torch.tensor(200.0).log().item(), rel=0.05)


def test_dropout_acts_in_training_only(make_model):
    model = make_model(dropout=0.5)
    tokens = torch.randint(12, (1, 8))
    model.eval()
    assert torch.equal(model(tokens).hidden, model(tokens).hidden)
    model.train()
    assert not torch.equal(model(tokens).hidden, model(tokens).hidden)


def test_projections_into_the_residual_stream_start_smaller(make_config):
    torch.manual_seed(0)
    model = ElaraLM(make_config(n_embd=128, hidden=256, expert_hidden=128, depth=2, init_std=0.1))
    residual = 0.1 / (2 * 2 * 2) ** 0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        into = any(part in name for part in ("out.weight", "down"))
        assert float(weight.detach().std()) == pytest.approx(residual if into else 0.1, rel=0.15), name


def test_positions_move_the_rotary_embedding_only(make_model, reference):
    """Attention depends on distances: shifting all positions alike changes nothing, stretching them does."""
    model = make_model(num_experts=0)
    tokens = torch.randint(12, (1, 6))
    place = torch.arange(6)[None]
    with torch.no_grad():
        base = model(tokens).hidden
        torch.testing.assert_close(model(tokens, positions=place + 20).hidden, base, rtol=0, atol=1e-4)
        assert (model(tokens, positions=place * 3).hidden - base).abs().max() > 1e-2
