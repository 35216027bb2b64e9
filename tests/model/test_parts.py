"""Norm, activation, rotary table and attention: the parts with backward passes or kernels of their own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from elara.model.attention import _attend, rope_angles
from elara.model.linear import Linear, linear
from elara.model.mlp import MLP, swiglu
from elara.model.norm import RMSNorm, rms_norm


def test_rms_norm_matches_its_formula_and_numerical_gradients(reference):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(RMSNorm(4, 1e-5)(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_rms_norm_gives_autocast_its_dtype():
    norm, x = RMSNorm(64, 1e-5), torch.randn(10, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = norm(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), norm(x), rtol=0.02, atol=0.02)


def test_swiglu_matches_its_formula_and_numerical_gradients(reference):
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(swiglu, (x,))
    mlp = MLP(6, 10).double()
    torch.testing.assert_close(mlp(x), reference.swiglu_mlp(x, mlp.gate_up.weight, mlp.down.weight))


def test_rotary_table_matches_the_formula():
    cos, sin = rope_angles(torch.tensor([[0, 1, 7, 255]]), 8, 10000.0)
    assert cos.shape == sin.shape == (1, 4, 1, 8)
    for i, position in enumerate((0, 1, 7, 255)):
        for pair in range(4):
            angle = position * 10000.0 ** (-2 * pair / 8)
            for at, sign in ((pair, -1), (pair + 4, 1)):
                assert float(cos[0, i, 0, at]) == pytest.approx(math.cos(angle), abs=3e-5)
                assert float(sin[0, i, 0, at]) == pytest.approx(sign * math.sin(angle), abs=3e-5)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 96), (2, 1, 96), (3, 96), (2, 40, 96), (300, 96)])
@pytest.mark.parametrize("outputs", [8, 5000])
def test_products_equal_torchs(monkeypatch, slow, shape, outputs):
    """Whichever library makes them: both are run here, on every processor."""
    monkeypatch.setattr("elara.model.linear.blas_is_slow", lambda: slow)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(outputs, 96, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    expected = x.double() @ weight.double().T
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear(x, weight, bias).double(), expected + bias, rtol=1e-4, atol=1e-4)
        sliced = torch.cat([x, x], -1)[..., 96:]
        torch.testing.assert_close(linear(sliced, weight).double(), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
    gradients = []
    for kind in (nn.Linear, Linear):
        layer = kind(96, outputs, bias=False)
        layer.weight = nn.Parameter(weight)
        given = x.clone().requires_grad_()
        layer(given).square().mean().backward()
        gradients.append([given.grad, layer.weight.grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_few_queries_equals_its_formula(dtype, heads, queries, masked):
    """Every kernel that decoding takes, by number of queries."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, t, 16, generator=generator).to(dtype)
               for n, t in ((heads[0], queries), (heads[1], 30), (heads[1], 30)))  # fmt: skip
    mask = torch.rand(2, 1, queries, 30, generator=generator) < 0.6 if masked else None
    wide_q, wide_k, wide_v = (t.double().repeat_interleave(heads[0] // t.shape[1], 1) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=mask)
    with torch.inference_mode():
        found = _attend(q, k, v, mask)
    assert found.dtype == dtype
    limit = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)


@pytest.mark.slow
def test_a_compiled_layer_makes_its_own_products(monkeypatch):
    """`compile=true`: the compiler knows oneDNN's product for constant weights only."""
    monkeypatch.setattr("elara.model.linear.blas_is_slow", lambda: True)
    torch.manual_seed(0)
    mlp, x = MLP(128, 128), torch.randn(64, 128)
    expected = mlp(x)
    torch.testing.assert_close(torch.compile(mlp)(x), expected, rtol=1e-4, atol=1e-5)
