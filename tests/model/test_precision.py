"""bf16 autocast and bf16 weights stay near float32, and float32 near float64."""

from __future__ import annotations

import pytest
import torch

from elara.model import KVCache, draw_section

SIZES = {"n_embd": 64, "hidden": 128, "expert_hidden": 64, "block_length": 4, "init_std": 0.08}


def run(model, tokens, section):
    output = model(tokens, section=section)
    logits = torch.cat([model.ar_head(output.hidden), model.diffusion_head(output.mask_hidden)], 1)
    gradients = torch.autograd.grad(logits.float().logsumexp(-1).sum(), list(model.parameters()), allow_unused=True)
    return logits.detach().float(), gradients


@pytest.mark.parametrize(
    "options", [{"num_experts": 0}, {"depth": 2}, {"depth": 2, "order": "stack", "checkpoint": True}]
)
def test_autocast_is_near_float32(make_model, options):
    model = make_model(dtype=torch.float32, **SIZES, **options)
    tokens = torch.randint(12, (3, 33), generator=torch.Generator().manual_seed(0))
    section = draw_section(tokens, model.config.tidar, 12, torch.Generator().manual_seed(0))[0]
    logits, gradients = run(model, tokens, section)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, rounded_gradients = run(model, tokens, section)
    assert (rounded - logits).norm() <= 0.03 * logits.norm()
    for name, exact, near in zip(dict(model.named_parameters()), gradients, rounded_gradients, strict=True):
        if ".router." not in name:  # near-ties choose other experts there
            assert (near.float() - exact).norm() <= 0.15 * exact.norm(), name


def test_autocast_on_a_long_text_is_near_float32(make_model):
    """Beyond the size up to which attention is computed by plain matmuls."""
    model = make_model(dtype=torch.float32, num_experts=0, context_length=1024, **SIZES)
    tokens = torch.randint(12, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(tokens).hidden
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = model(tokens).hidden
    assert (near.float() - exact).norm() <= 0.03 * exact.norm()


def test_bfloat16_cache_under_autocast(make_model):
    model = make_model(dtype=torch.float32, depth=2, **SIZES)
    tokens = torch.randint(12, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(tokens).hidden
        cache = KVCache(model.config, 1, 20, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = torch.cat([model(part, cache=cache).hidden for part in tokens.split(5, 1)], 1)
    assert (near.float() - exact).norm() <= 0.03 * exact.norm()


def test_float32_is_near_float64(make_model):
    single, double = make_model(dtype=torch.float32, depth=2), make_model(depth=2)
    tokens = torch.randint(12, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(single(tokens).hidden.double(), double(tokens).hidden, rtol=1e-4, atol=1e-4)
