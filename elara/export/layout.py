"""Which tensors a GGUF file holds, in their order, and which piece of a checkpoint's weight each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from elara.config import ElaraConfig

UNROLLED, COMPACT = "hy_v3", "elara"  # architectures: llama.cpp's, with a block per pass; ours, with every block once
NO_SHARED = 32  # width of the shared expert, all zeros, that hy_v3 needs where a model has none


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint, or a part of it, under the names that it has in the file.

    names: one per recursion pass, which all hold the same values. shape: (out, in) order, as numpy has it. weight: its
    name in the state dict; None: all zeros. index: what of the weight, as an index of the tensor; () = all of it.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    weight: str | None
    index: tuple[Any, ...] = ()


def effective_layers(config: ElaraConfig, block: int, depth: int, architecture: str) -> list[int]:
    """The file's blocks that hold a physical block: one per recursion pass where recursion is unrolled, else itself."""
    if architecture == COMPACT:
        return [block]
    if config.trm.order == "block":
        return [block * depth + recursion for recursion in range(depth)]
    return [recursion * config.model.n_layer + block for recursion in range(depth)]


def pieces(config: ElaraConfig, architecture: str, depth: int) -> Iterator[Piece]:
    """Every tensor of the file. depth: recursion depth that the file is for.

    The passes of a block follow each other, so that each weight is read and quantized once.
    """
    m = config.model
    yield Piece(("token_embd.weight",), (config.vocab_size, m.n_embd), "embed.weight")
    yield Piece(("output_norm.weight",), (m.n_embd,), "norm.weight")
    for block in range(m.n_layer):
        layers = effective_layers(config, block, depth, architecture)
        for name, shape, weight, index in _block(config, block, architecture, depth):
            yield Piece(tuple(f"blk.{layer}.{name}" for layer in layers), shape, f"blocks.{block}.{weight}", index)
        if block in config.moe_layers:
            yield from _router(config, block, architecture, depth)
            if not config.moe.num_shared and architecture == UNROLLED:
                yield from _no_shared_expert(config, layers)
    if architecture == COMPACT:
        yield from _drafting(config)


Part = tuple[str, tuple[int, ...], str, tuple[Any, ...]]  # name, shape, weight, index


def _block(config: ElaraConfig, block: int, architecture: str, depth: int) -> Iterator[Part]:
    m, n = config.model, config.model.n_embd
    q, kv = m.n_head * config.head_dim, config.n_kv_head * config.head_dim
    rows = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
    yield "attn_norm.weight", (n,), "attention_norm.weight", ()
    for name, part in rows.items():
        size = part.stop - part.start
        yield f"attn_{name}.weight", (size, n), "attention.qkv.weight", (part,)
        if m.bias:
            yield f"attn_{name}.bias", (size,), "attention.qkv.bias", (part,)
    yield "attn_q_norm.weight", (config.head_dim,), "attention.q_norm.weight", ()
    yield "attn_k_norm.weight", (config.head_dim,), "attention.k_norm.weight", ()
    yield "attn_output.weight", (n, q), "attention.out.weight", ()
    yield "ffn_norm.weight", (n,), "mlp_norm.weight", ()
    if block not in config.moe_layers:
        yield from _mlp("", "mlp", m.hidden, n)
        return
    experts, hidden = config.moe.num_experts, config.expert_hidden
    yield "ffn_gate_inp.weight", (experts, n), "mlp.router.weight", ()
    every = slice(None)
    for name, half in (("gate", slice(0, hidden)), ("up", slice(hidden, 2 * hidden))):
        yield f"ffn_{name}_exps.weight", (experts, hidden, n), "mlp.experts.gate_up", (every, half)
    yield "ffn_down_exps.weight", (experts, n, hidden), "mlp.experts.down", ()
    if config.moe.num_shared:
        yield from _mlp("_shexp", "mlp.shared", hidden * config.moe.num_shared, n)


def _mlp(suffix: str, weight: str, hidden: int, n: int) -> Iterator[Part]:
    yield f"ffn_gate{suffix}.weight", (hidden, n), f"{weight}.gate_up.weight", (slice(0, hidden),)
    yield f"ffn_up{suffix}.weight", (hidden, n), f"{weight}.gate_up.weight", (slice(hidden, 2 * hidden),)
    yield f"ffn_down{suffix}.weight", (n, hidden), f"{weight}.down.weight", ()


def _router(config: ElaraConfig, block: int, architecture: str, depth: int) -> Iterator[Piece]:
    """Selection biases: a row for each pass; passes deeper than trained use the last one's."""
    weight, experts, trained = f"blocks.{block}.mlp.router.selection_bias", config.moe.num_experts, config.trm.max_depth
    if architecture == COMPACT:
        row = [min(recursion, trained - 1) for recursion in range(max(depth, trained))]
        yield Piece((f"blk.{block}.exp_probs_b",), (len(row), experts), weight, (row,))
        return
    for recursion, layer in enumerate(effective_layers(config, block, depth, architecture)):
        yield Piece((f"blk.{layer}.exp_probs_b",), (experts,), weight, (min(recursion, trained - 1),))


def _no_shared_expert(config: ElaraConfig, layers: list[int]) -> Iterator[Piece]:
    n = config.model.n_embd
    for name, shape in (("gate", (NO_SHARED, n)), ("up", (NO_SHARED, n)), ("down", (n, NO_SHARED))):
        yield Piece(tuple(f"blk.{layer}.ffn_{name}_shexp.weight" for layer in layers), shape, None)


def _drafting(config: ElaraConfig) -> Iterator[Piece]:
    """What drafts: the diffusion head and its chain."""
    if not config.tidar.block_length:
        return
    n = config.model.n_embd
    if not config.tidar.tie_head:
        yield Piece(("diffusion.weight",), (config.vocab_size, n), "diffusion.weight")
    if config.tidar.chain:
        yield Piece(("chain_norm.weight",), (n,), "chain.norm.weight")
        for name, half in (("gate", slice(0, n)), ("up", slice(n, 2 * n))):
            yield Piece((f"chain_{name}.weight",), (n, 2 * n), "chain.mlp.gate_up.weight", (half,))
        yield Piece(("chain_down.weight",), (n, n), "chain.mlp.down.weight")
