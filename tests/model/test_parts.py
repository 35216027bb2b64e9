"""Norm, activation, rotary table and attention: the parts with backward passes or kernels of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from elara.model.attention import rope_angles
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
