"""Router and experts beyond what the comparison with the reference shows."""

from __future__ import annotations

import pytest
import torch

from elara.model import CLEAN, MASK, RoutingStats
from elara.model.moe import MoE, Router


@pytest.fixture
def router(make_config):
    torch.manual_seed(0)
    router = Router(make_config(num_experts=8, gate_scale=1.5))
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def test_gates_are_the_chosen_scores_renormalised(router):
    x = torch.randn(2, 7, 16)
    choice = router(x)
    scores = (x @ router.weight.T).sigmoid().flatten(0, 1)
    picked = scores.gather(1, choice.experts)
    torch.testing.assert_close(choice.gates, 1.5 * picked / picked.sum(1, keepdim=True))
    torch.testing.assert_close(choice.gates.sum(1), torch.full((14,), 1.5))
    assert torch.equal(choice.experts.sort(1).values, scores.topk(2).indices.sort(1).values)


def test_the_selection_bias_changes_the_choice_and_no_gate_value(router):
    x = torch.randn(1, 50, 16)
    router.selection_bias[:, 3] = 10.0
    choice = router(x)
    assert (choice.experts == 3).any(1).all()
    scores = (x @ router.weight.T).sigmoid()[0].gather(1, choice.experts)
    torch.testing.assert_close(choice.gates, 1.5 * scores / scores.sum(1, keepdim=True))
    router.selection_bias[:, 3] = -10.0
    assert not (router(x).experts == 3).any()


def test_a_bias_shared_by_all_experts_changes_nothing(router):
    x = torch.randn(1, 50, 16)
    before = router(x)
    router.selection_bias += 0.3
    assert torch.equal(router(x).experts, before.experts)


def test_the_bias_is_saved_and_not_trained(router):
    assert "selection_bias" in router.state_dict()
    assert not router.selection_bias.requires_grad


def test_the_router_stays_in_float32_under_autocast(router):
    x = torch.randn(1, 40, 16)
    wanted = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(x)
    assert got.gates.dtype == torch.float32
    assert torch.equal(got.experts, wanted.experts)
    assert torch.equal(got.gates, wanted.gates)


def test_loads_are_counted_by_section(router):
    x = torch.randn(3, 10, 16)
    choice = router(x)
    experts = choice.experts.view(3, 10, 2)
    load = RoutingStats([choice, router(-x)], choice.penalty, rows=3, seq=6, experts=8, passes=2).load
    assert load.shape == (1, 2, 2, 8)
    assert torch.equal(load[0, 0, CLEAN], torch.bincount(experts[:, :6].flatten(), minlength=8).float())
    assert torch.equal(load[0, 0, MASK], torch.bincount(experts[:, 6:].flatten(), minlength=8).float())
    assert not torch.equal(load[0, 1], load[0, 0])
    assert load.sum() == 2 * 3 * 10 * 2


@pytest.mark.parametrize("count", [1, 3, 33])
def test_row_padding_in_bfloat16_changes_nothing(make_config, count):
    """Under bf16 every expert's rows are padded; the result and the gradients stay near those in float32."""
    torch.manual_seed(0)
    moe = MoE(make_config(n_embd=64, expert_hidden=32))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, count, 64)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, _ = moe(x, moe.experts.weights("cpu"))
        gradients = torch.autograd.grad((y.float() ** 2).sum(), list(moe.parameters()))
        results.append([y.detach().float(), *gradients])
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded.float()).norm() <= 0.02 * exact.norm()


def test_idle_experts_get_zero_gradients_not_none(make_model):
    """DDP needs a gradient of every parameter, also when a batch leaves experts idle."""
    model = make_model(num_experts=8, every=1)
    model(torch.zeros(1, 1, dtype=torch.long)).hidden.sum().backward()
    idle = 0
    for block in model.blocks:
        assert block.mlp.experts.gate_up.grad is not None
        idle += int((block.mlp.experts.gate_up.grad.abs().amax((1, 2)) == 0).sum())
    assert idle == 2 * 6


def test_one_token_touches_only_its_experts(make_model):
    """What decoding relies on: NaN in an expert that nobody chose never shows."""
    model = make_model(num_experts=8, every=1, n_layer=1)
    tokens = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        before = model(tokens)
        unused = (before.routing.load[0, 0].sum(0) == 0).nonzero().flatten()
        model.blocks[0].mlp.experts.gate_up[unused] = torch.nan
        assert torch.equal(model(tokens).hidden, before.hidden)


def test_a_dense_model_has_empty_statistics(make_model):
    routing = make_model(num_experts=0, depth=2)(torch.zeros(1, 3, dtype=torch.long)).routing
    assert routing.load.shape == (0, 2, 2, 0)
    assert float(routing.penalty) == 0
