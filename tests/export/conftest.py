"""Small checkpoints to export, with random weights or trained for seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elara import checkpoint
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.errors import ElaraError
from elara.export.source import Source, open_source
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer, padded_vocab
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer
from elara.tokenizer.gpt2 import MERGES_SHA256, GPT2Tokenizer
from tests.conftest import ROOT, Home

TEXT = "The naïve bee said: “I’ve 3 flowers — ünd höney” 🐝蜂.\n\tAnd then?  "
MAKE = Callable[..., Source]


@pytest.fixture(scope="session")
def gpt2() -> GPT2Tokenizer:
    try:
        return GPT2Tokenizer.fetch(ROOT / "data" / "archives")
    except ElaraError as error:
        pytest.skip(f"GPT-2's merges cannot be had ({MERGES_SHA256[:8]}): {error}")


@pytest.fixture
def tokenizers(request: pytest.FixtureRequest) -> Callable[[str], Tokenizer]:
    """A tokenizer by its kind."""

    def get(kind: str) -> Tokenizer:
        if kind == "gpt2":
            found: Tokenizer = request.getfixturevalue("gpt2")
            return found
        return ByteTokenizer() if kind == "byte" else CharTokenizer(TEXT)

    return get


def config(*, n_embd: int = 64, moe: bool = True, depth: int = 2, order: str = "block", **others: Any) -> ElaraConfig:
    """A small architecture with everything in it; others: `model.bias=True` and so on, with __ for the dot."""
    built = ElaraConfig(
        ModelConfig(n_layer=2, n_embd=n_embd, n_head=4, n_kv_head=2, hidden=n_embd, expert_hidden=n_embd,
                    context_length=128, bias=True, init_std=0.4 / n_embd**0.5),
        MoEConfig(num_experts=4 if moe else 0, top_k=2, num_shared=1),
        TRMConfig(depth=depth, order=order),
        TiDARConfig(block_length=4, chain=True, draft_routing="anchor"),
    )  # fmt: skip
    for key, value in others.items():
        group, _, name = key.partition("__")
        setattr(getattr(built, group), name, value)
    return built


def random_model(built: ElaraConfig, tokenizer: Tokenizer, seed: int = 0) -> ElaraLM:
    """Random weights, norms and selection biases; the vocabulary is the tokenizer's."""
    built.model.vocab_size = padded_vocab(tokenizer.vocab_size)
    torch.manual_seed(seed)
    model = ElaraLM(built)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "norm" in name:
                value.normal_(1.0, 0.2)
            elif name.endswith(("bias", "selection_bias")):
                value.normal_(0.0, 0.2)
    return model.eval()


@pytest.fixture
def make(tmp_path: Path) -> MAKE:
    """Saves a random model as a checkpoint and opens it: make(config, tokenizer, meta={}, **open_source's own)."""

    def saved(built: ElaraConfig, tokenizer: Tokenizer, meta: dict[str, Any] | None = None, **options: Any) -> Source:
        folder = tmp_path / "checkpoint"
        checkpoint.save(folder, random_model(built, tokenizer), tokenizer, meta={"step": 7, **(meta or {})})
        return open_source(folder, **options)

    return saved


@pytest.fixture(scope="session")
def trained(session_home: Home) -> Path:
    """A run folder: a character model of width 256 and the quick run's architecture, trained for half a minute."""
    text = session_home.path / "words.txt"
    generator = random.Random(1)
    syllables = ["ba", "ko", "li", "mu", "ne", "po", "ra", "su", "ti", "wa"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(300)]
    text.write_text(" ".join(generator.choices(words, k=20000)), "utf-8")
    done = session_home.call(
        "data=text", f"data.path={text}", "name=trained", "trainer.max_steps=80", "data.batch_size=8",
        "model.context_length=128", "trainer.val_check_interval=80", "trainer.precision=32-true",
        "callbacks.samples.max_new_tokens=8", "callbacks.acceptance.prompts=2", "callbacks.acceptance.new_tokens=6",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return session_home.only_run("trained")
