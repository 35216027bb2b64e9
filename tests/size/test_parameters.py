"""Counting against numbers worked out by hand and against a model that is really built."""

import pytest
import torch

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.model import ElaraLM, KVCache
from elara.size import PARTS, adamw_bytes, count_parameters, kv_cache_bytes, size_report


def config(**model: object) -> ElaraConfig:
    sizes: dict = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "hidden": 96, "expert_hidden": 32}
    return ElaraConfig(
        ModelConfig(**{**sizes, "vocab_size": 128, **model}), MoEConfig(num_experts=8), TRMConfig(2), TiDARConfig(4)
    )


def test_parts_by_hand() -> None:
    parts = count_parameters(ElaraLM(config()))
    assert tuple(parts) == PARTS
    totals = {name: part.total for name, part in parts.items()}
    assert totals == {
        "embedding": 128 * 64,
        "attention": 4 * (64 * (64 + 2 * 32) + 64 * 64),
        "dense MLP": 2 * 3 * 64 * 96,
        "routed experts": 2 * 8 * 3 * 64 * 32,
        "shared experts": 2 * 3 * 64 * 32,
        "router": 2 * 8 * 64,
        "norms": 4 * (2 * 64 + 2 * 16) + 64,
        "diffusion head": 128 * 64,
    }
    assert parts["routed experts"].active == totals["routed experts"] // 4
    assert parts["diffusion head"].active == 0
    assert all(part.active == part.total for name, part in parts.items() if name not in PARTS[3:4] + PARTS[-1:])


@pytest.mark.parametrize("model", [{}, {"bias": True}, {"n_kv_head": None, "expert_hidden": None}])
def test_report_from_the_meta_device_equals_a_real_model(model: dict) -> None:
    report = size_report(config(**model))
    assert report["total"] == sum(p.numel() for p in ElaraLM(config(**model)).parameters())
    assert report["without_diffusion_head"] == report["total"] - 128 * 64


def test_active_parameters_are_the_ones_a_token_meets() -> None:
    """One token's gradient: a routed expert that was not chosen gets none."""
    torch.manual_seed(0)
    model = ElaraLM(config())
    model.ar_head(model(torch.tensor([[5]]), depth=1).hidden).logsumexp(-1).sum().backward()
    met = 0
    for name, weight in model.named_parameters():
        if weight.grad is None:
            continue
        rows = weight.grad.flatten(1).any(1) if ".experts." in name else torch.tensor([True])
        met += weight.numel() * int(rows.sum()) // len(rows)
    assert met == size_report(model.config)["active"]


def test_kv_cache_bytes_are_those_of_a_real_cache() -> None:
    cache = KVCache(config(), batch=1, capacity=10)
    assert kv_cache_bytes(config(), 4) * 10 == cache.k.nbytes + cache.v.nbytes


def test_adamw_bytes_are_those_of_a_real_optimizer() -> None:
    model = ElaraLM(config())
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    parameters = list(model.parameters())
    moments = sum(optimizer.state[p][m].nbytes for p in parameters for m in ("exp_avg", "exp_avg_sq"))
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert adamw_bytes(sum(p.numel() for p in parameters)) == sum(p.nbytes for p in parameters) + gradients + moments
