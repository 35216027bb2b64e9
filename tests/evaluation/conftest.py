"""Small checkpoints in memory, in float64 where results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from elara.checkpoint import Loaded
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.evaluation.text import HeldOutText
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'-&\n"  # a Shakespeare reader's


@pytest.fixture(autouse=True, scope="module")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What decoding steps of these models cost is kept apart from the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELARA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def make_loaded() -> Callable[..., Loaded]:
    """A seeded model with a tokenizer; it writes and scores nonsense, but not all tokens alike."""

    def make(
        seed: int = 0, tokenizer: Tokenizer | None = None, dtype: torch.dtype = torch.float64, context: int = 24,
        block: int = 4, **model: Any,
    ) -> Loaded:  # fmt: skip
        torch.manual_seed(seed)
        tokenizer = tokenizer or CharTokenizer(CHARACTERS)
        rows = -(-tokenizer.vocab_size // 64) * 64
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "hidden": 32, "init_std": 0.3} | model
        config = ElaraConfig(
            ModelConfig(vocab_size=rows, context_length=context, **sizes),
            MoEConfig(num_experts=4),
            TRMConfig(depth=2),
            TiDARConfig(block_length=block),
        )
        lm = ElaraLM(config)
        with torch.no_grad():
            lm.norm.weight.neg_()  # with tied embeddings an untrained model would repeat its last token for ever
        return Loaded(lm.to(dtype).eval(), tokenizer, config, {"step": 1})

    return make


@pytest.fixture(scope="session")
def loaded(make_loaded: Callable[..., Loaded]) -> Loaded:
    return make_loaded()


@pytest.fixture(scope="session")
def byte_loaded(make_loaded: Callable[..., Loaded]) -> Loaded:
    return make_loaded(seed=1, tokenizer=ByteTokenizer())


@pytest.fixture(scope="session")
def text() -> HeldOutText:
    passages = [
        "If music be the food of love, play on;\nGive me excess of it, that, surfeiting,\n",
        "The appetite may sicken, and so die.\nThat strain again! it had a dying fall:\n",
        "O, it came o'er",
    ]
    return HeldOutText("three passages", passages, 1)


@pytest.fixture(scope="session")
def naive() -> Callable[..., tuple[list[float], bool]]:
    """Log-probability of each target behind `inputs`, one whole forward per target, and whether all are likeliest
    (of the ids below `ids` when that is given)."""

    @torch.no_grad()
    def compute(model: ElaraLM, inputs: list[int], targets: list[int], ids: Any = None) -> tuple[list[float], bool]:
        found, greedy, read = [], True, list(inputs)
        for target in targets:
            logits = model.ar_head(model(torch.tensor([read])).hidden[0, -1])
            found.append(float(logits.log_softmax(0)[target]))
            greedy = greedy and int(logits[:ids].argmax()) == target
            read.append(target)
        return found, greedy

    return compute
