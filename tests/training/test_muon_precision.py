"""Orthogonalization in bf16 stays as close to orthogonal as in float32."""

from __future__ import annotations

import pytest
import torch

from elara.training.muon import orthogonalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 32, 32), (3, 64, 32), (3, 32, 64), (4, 128, 384), (2, 256, 256)])
@pytest.mark.parametrize("rank", [None, 4])
def test_no_singular_value_escapes(dtype: torch.dtype, shape: tuple[int, int, int], rank: int | None) -> None:
    torch.manual_seed(0)
    count, rows, columns = shape
    x = torch.randn(shape) if rank is None else torch.randn(count, rows, rank) @ torch.randn(count, rank, columns)
    values = torch.linalg.svdvals(orthogonalize(x.to(dtype)).float())
    kept = values[:, : rank or min(rows, columns) * 3 // 4]  # the smallest need more steps than five
    assert values.max() < 1.2
    assert kept.min() > 0.6
