"""The smoke check passes for models that train and names what is wrong with those that cannot."""

import math
import os
from dataclasses import replace

import pytest
import torch

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.model.moe import Router
from elara.training.smoke import Smoke, fits, smoke_check

CONFIG = ElaraConfig(
    ModelConfig(n_layer=2, n_embd=64, n_head=2, hidden=64, vocab_size=256, context_length=128),
    MoEConfig(num_experts=8),
    TRMConfig(depth=2),
    TiDARConfig(block_length=4, block_fraction=0.25),
)


@pytest.mark.parametrize("tidar", [TiDARConfig(), CONFIG.tidar, TiDARConfig(8, schedule="cosine")])
@pytest.mark.parametrize("moe", [MoEConfig(), CONFIG.moe, MoEConfig(num_experts=32, every=1, num_shared=0)])
def test_sound_models_pass(moe: MoEConfig, tidar: TiDARConfig) -> None:
    result = smoke_check(replace(CONFIG, moe=moe, tidar=tidar))
    assert result.problems == []
    assert result.expected == math.log(256)
    assert (result.diffusion is None) == (not tidar.block_length)


def test_same_seed_same_losses_and_no_trace_in_the_random_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert smoke_check(CONFIG) == smoke_check(CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


def test_wild_initial_weights_are_found() -> None:
    result = smoke_check(replace(CONFIG, model=replace(CONFIG.model, init_std=0.5)))
    assert any("initial AR loss" in problem for problem in result.problems)


def test_loss_that_is_not_a_number_is_found() -> None:
    assert Smoke(5.5, math.nan, None, []).problems == ["the AR loss is nan"]
    assert Smoke(5.5, 5.5, math.inf, []).problems == ["the diffusion loss is inf"]


def test_expert_that_no_token_reaches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Router.__init__

    def unfair(self: Router, config: ElaraConfig) -> None:
        original(self, config)
        self.selection_bias[:, 5] = -10.0

    monkeypatch.setattr(Router, "__init__", unfair)
    result = smoke_check(CONFIG)
    assert result.without_gradient == ["blocks.1.mlp.experts.gate_up[5]", "blocks.1.mlp.experts.down[5]"]
    assert "blocks.1.mlp.experts.gate_up[5]" in result.problems[0]


def test_fits_asks_for_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert fits(1000 * 4096 // 32)
    assert not fits(1000 * 4096 // 32 + 1)
