"""The estimate of activations against what the whole model really keeps."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.model import ElaraLM, draw_section
from elara.size import activation_bytes

BASE = ElaraConfig(
    ModelConfig(n_layer=5, n_embd=256, n_head=4, hidden=512, expert_hidden=256, vocab_size=64, context_length=384),
    MoEConfig(num_experts=8),
    TRMConfig(depth=2),
    TiDARConfig(block_length=8, block_fraction=0.5),
)
VARIANTS = {
    "all ideas": BASE,
    "stack order": replace(BASE, trm=TRMConfig(depth=3, order="stack")),
    "grouped queries": replace(BASE, model=replace(BASE.model, n_head=8, n_kv_head=2)),
    "one key head": replace(BASE, model=replace(BASE.model, n_kv_head=1)),
    "dense, no section": replace(BASE, moe=MoEConfig(), tidar=TiDARConfig()),
    "all blocks MoE": replace(BASE, moe=MoEConfig(num_experts=4, every=1)),
}


def held() -> list[Tensor]:
    """Every tensor of this process but those without storage, which compiling leaves behind."""
    return [found for found in gc.get_objects() if type(found) in (Tensor, Parameter)]


def kept_bytes(config: ElaraConfig) -> int:
    """Bytes alive between forward and backward: what autograd saved, and what checkpointing holds on to."""
    model = ElaraLM(config)
    tokens = torch.randint(64, (1, config.model.context_length))
    section = None
    if config.tidar.block_length:
        section, _ = draw_section(tokens, config.tidar, 63, torch.Generator().manual_seed(0))
    gc.collect()
    before = {tensor.untyped_storage().data_ptr() for tensor in held()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, section=section).hidden.sum()
    for tensor in held():  # inputs of checkpointed blocks hang in Python closures, unseen by the hooks
        if tensor is not loss:
            keep(tensor)
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in before)


@pytest.mark.slow
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_plain_estimate_is_within_a_percent(config: ElaraConfig) -> None:
    assert activation_bytes(config).plain == pytest.approx(kept_bytes(config), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("config", [VARIANTS["all ideas"], VARIANTS["stack order"]], ids=["block", "stack"])
def test_checkpointed_estimate_is_within_ten_percent(config: ElaraConfig) -> None:
    estimate = activation_bytes(config)
    real = kept_bytes(replace(config, trm=replace(config.trm, checkpoint=True)))
    assert estimate.checkpointed == pytest.approx(real, rel=0.1)
    assert estimate.checkpointed + estimate.recomputed < estimate.plain


def test_estimating_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    activation_bytes(BASE)
    assert torch.equal(torch.get_rng_state(), state)
