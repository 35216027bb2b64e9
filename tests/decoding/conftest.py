"""Tiny models for decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.decoding import Step, generate
from elara.model import ElaraLM

SIZES: dict[str, Any] = {
    "n_layer": 2, "n_embd": 16, "n_head": 2, "hidden": 16, "vocab_size": 11, "context_length": 24, "init_std": 0.35,
    "num_experts": 4, "block_length": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def make_model() -> Callable[..., ElaraLM]:
    """A seeded float64 model whose diffusion head is near its AR head, so that drafts stand now and then."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> ElaraLM:
        torch.manual_seed(seed)
        given = SIZES | options
        groups: list[Any] = [ModelConfig, MoEConfig, TRMConfig, TiDARConfig]
        known = [{field.name for field in fields(group)} for group in groups]
        parts = [
            group(**{key: given.pop(key) for key in list(given) if key in names})
            for group, names in zip(groups, known, strict=True)
        ]
        assert not given, f"unknown option {given}"
        model = ElaraLM(ElaraConfig(*parts))
        with torch.no_grad():
            model.norm.weight.neg_()  # with tied embeddings an untrained model would repeat its last token for ever
            if model.diffusion is not None:
                model.diffusion.weight.mul_(0.5).add_(model.embed.weight)
            if model.chain is not None:
                model.chain.mlp.down.weight.mul_(0.5)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def write() -> Callable[..., tuple[list[list[int]], list[Step]]]:
    """Run `generate` to its end: each row's tokens, and the steps."""

    def run(model: ElaraLM, prompts: list[list[int]], *args: Any, **options: Any) -> tuple[list[list[int]], list[Step]]:
        texts: list[list[int]] = [[] for _ in prompts]
        steps: Iterator[Step] = generate(model, prompts, *args, **options)
        kept = list(steps)
        for step in kept:
            for text, new in zip(texts, step.tokens, strict=True):
                text += new
        return texts, kept

    return run
