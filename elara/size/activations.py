"""What a training step keeps between forward and backward, measured on small relatives of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elara.config import ElaraConfig
from elara.model import ElaraLM, MaskSection, draw_section

MEASURED_LENGTH = 128  # tokens in the models that are measured


@dataclass(frozen=True)
class Activations:
    """Bytes that one training sequence keeps from forward to backward, in float32, the heads' logits left out.

    plain: without trm.checkpoint. checkpointed: with it, little more than the block inputs. recomputed: what the
    largest block then needs on top of that while the backward pass goes through it.
    """

    plain: int
    checkpointed: int
    recomputed: int


def activation_bytes(config: ElaraConfig) -> Activations:
    """Estimated bytes per sequence of context_length tokens, with the mask section that the configuration asks for.

    Measured, not written down: small relatives of the model run forward with their saved tensors counted. What they
    save is linear in the width and in the number of blocks of each kind. Only attention grows faster than the tokens:
    it is measured at full length, the rest on a short sequence.
    """
    m, moe = config.model, len(config.moe_layers)
    short = min(m.context_length, max(MEASURED_LENGTH, 8 * config.tidar.block_length))
    tokens = m.context_length + _section_length(config, m.context_length)
    growth = tokens / (short + _section_length(config, short))
    dense = replace(config, moe=replace(config.moe, num_experts=0))
    one, two = (_at_full_width(dense, blocks, short) for blocks in (1, 2))
    outside = (one - (two - one)) * growth
    dense_block = _at_full_width(dense, 1, m.context_length) - outside
    moe_block = 0.0
    if moe:
        all_moe = replace(config, moe=replace(config.moe, every=1))
        moe_block = dense_block + (_at_full_width(all_moe, 1, short) - one) * growth
    inside = (m.n_layer - moe) * dense_block + moe * moe_block
    visits = config.trm.depth if config.trm.order == "stack" else 1  # to a block, each with an input to keep
    inputs = m.n_layer * visits * tokens * m.n_embd * 4
    largest = max(moe_block, dense_block if moe < m.n_layer else 0)
    return Activations(round(outside + inside), round(outside + inputs), round(largest / visits))


def _at_full_width(config: ElaraConfig, blocks: int, tokens: int) -> int:
    """Saved bytes of `blocks` blocks, from models with one and two of the key/value heads and their share of width."""
    heads = config.n_kv_head
    one = _saved_bytes(_relative(config, 1, blocks), tokens)
    return one if heads == 1 else one + (heads - 1) * (_saved_bytes(_relative(config, 2, blocks), tokens) - one)


def _relative(config: ElaraConfig, units: int, blocks: int) -> ElaraConfig:
    """The same model with `units` of its key/value heads, their share of every other width, and `blocks` blocks."""
    m, heads = config.model, config.n_kv_head
    return replace(
        config,
        model=replace(
            m,
            n_layer=blocks,
            n_embd=m.n_embd * units // heads,
            n_head=m.n_head * units // heads,
            n_kv_head=units,
            hidden=max(1, m.hidden * units // heads),
            expert_hidden=max(1, config.expert_hidden * units // heads),
            vocab_size=8,
        ),
        trm=replace(config.trm, checkpoint=False),
        tidar=replace(config.tidar, tie_head=True),
    )


def _section(config: ElaraConfig, tokens: int) -> MaskSection | None:
    if not config.tidar.block_length:
        return None
    clean = torch.zeros(1, tokens, dtype=torch.long)
    return draw_section(clean, config.tidar, 0, torch.Generator().manual_seed(0))[0]


def _section_length(config: ElaraConfig, tokens: int) -> int:
    section = _section(config, tokens)
    return section.length if section is not None else 0


def _saved_bytes(config: ElaraConfig, tokens: int) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass of one sequence, weights left out."""
    with torch.random.fork_rng(devices=[]):
        model = ElaraLM(config)
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Any] = []  # a freed tensor's address would be given out again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    ids = torch.arange(tokens).remainder(config.vocab_size)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, section=_section(config, tokens))
    return sum(kept.values())
