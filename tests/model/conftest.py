"""Small models and the slow reference that the fast ones are compared with."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.model import ElaraLM


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """tests/model/reference.py (tests are no package, so it is loaded by its path)."""
    path = Path(__file__).with_name("reference.py")
    spec = importlib.util.spec_from_file_location("elara_model_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ElaraConfig]:
    """A tiny config; keywords go to the group that knows them."""

    def make(**options: Any) -> ElaraConfig:
        sizes: dict[str, Any] = {
            "n_layer": 2, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "hidden": 24, "expert_hidden": 8,
            "vocab_size": 13, "context_length": 64, "init_std": 0.3, "num_experts": 4, "block_length": 3,
        }  # fmt: skip
        sizes |= options
        groups: list[Any] = [ModelConfig, MoEConfig, TRMConfig, TiDARConfig]
        parts = [
            group(**{key: sizes.pop(key) for key in list(sizes) if key in group.__dataclass_fields__})
            for group in groups
        ]
        assert not sizes, f"unknown option {sizes}"
        return ElaraConfig(*parts)

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., ElaraConfig]) -> Callable[..., ElaraLM]:
    """A seeded float64 model whose norms, biases and selection biases are random too, not at their initial values."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> ElaraLM:
        torch.manual_seed(seed)
        model = ElaraLM(make_config(**options))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                torch.nn.init.normal_(buffer, std=0.1)
        return model.to(dtype)

    return make
