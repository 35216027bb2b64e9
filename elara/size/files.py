"""Bytes of the exported weights: llama.cpp's tensors and the types that its quantizer gives them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from elara.config import ElaraConfig

BLOCKS = {  # ggml's block formats: (bytes, weights) of one block
    "F32": (4, 1),
    "BF16": (2, 1),
    "F16": (2, 1),
    "Q8_0": (34, 32),
    "Q6_K": (210, 256),
    "Q5_K": (176, 256),
    "Q4_K": (144, 256),
    "Q5_1": (24, 32),
    "Q5_0": (22, 32),
}
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q5_0": "F16", "Q5_1": "F16", "Q8_0": "F16"}
FORMATS = ("fp32", "bf16", "Q8_0", "Q4_K_M")


def file_bytes(config: ElaraConfig, format: str, *, unrolled: bool) -> int:
    """Bytes of the exported weights (llama.cpp's tensors; no diffusion head, no metadata).

    format: one of FORMATS; the quantized ones choose each tensor's type as llama.cpp's quantizer does. unrolled: one
    copy of a block per recursion pass, which GGUF needs, instead of one.
    """
    layers = config.model.n_layer * (config.trm.depth if unrolled else 1)
    total = 0
    for name, layer, shape in exported_tensors(config, unrolled=unrolled):
        block_bytes, weights = BLOCKS[tensor_type(name, shape, format, layer, layers, config.moe.num_experts)]
        total += math.prod(shape) // weights * block_bytes
    return total


def exported_tensors(config: ElaraConfig, *, unrolled: bool) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(name, layer, shape) of every tensor under llama.cpp's names (architecture hy_v3); layer -1 is outside them."""
    m, moe, depth = config.model, config.moe, config.trm.depth
    q, kv, n = m.n_head * config.head_dim, config.n_kv_head * config.head_dim, m.n_embd
    yield "token_embd.weight", -1, (config.vocab_size, n)
    yield "output_norm.weight", -1, (n,)
    block = list(range(m.n_layer))
    if unrolled and config.trm.order == "block":
        block = [i for i in block for _ in range(depth)]
    elif unrolled:
        block = block * depth
    for layer, physical in enumerate(block):
        tensors: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (n,),
            "attn_q.weight": (q, n),
            "attn_k.weight": (kv, n),
            "attn_v.weight": (kv, n),
            "attn_output.weight": (n, q),
            "attn_q_norm.weight": (config.head_dim,),
            "attn_k_norm.weight": (config.head_dim,),
            "ffn_norm.weight": (n,),
        }
        if m.bias:
            tensors |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if physical not in config.moe_layers:
            tensors |= _mlp("", (), m.hidden, n)
        else:
            hidden = config.expert_hidden
            bias = (moe.num_experts,) if unrolled else (config.trm.max_depth, moe.num_experts)  # one per pass
            tensors |= {"ffn_gate_inp.weight": (moe.num_experts, n), "exp_probs_b": bias}
            tensors |= _mlp("_exps", (moe.num_experts,), hidden, n)
            tensors |= _mlp("_shexp", (), hidden * moe.num_shared, n) if moe.num_shared else {}
        for name, shape in tensors.items():
            yield f"blk.{layer}.{name}", layer, shape


def _mlp(suffix: str, stack: tuple[int, ...], hidden: int, n_embd: int) -> dict[str, tuple[int, ...]]:
    up = (*stack, hidden, n_embd)
    return {
        f"ffn_gate{suffix}.weight": up,
        f"ffn_up{suffix}.weight": up,
        f"ffn_down{suffix}.weight": (*stack, n_embd, hidden),
    }


def tensor_type(name: str, shape: tuple[int, ...], format: str, layer: int, layers: int, experts: int) -> str:
    """The ggml type that llama.cpp's quantizer gives a tensor (src/llama-quant.cpp, llama_tensor_get_type_impl).

    Vectors and the router stay F32. Q4_K_M keeps the tied embedding, and attn_v and ffn_down of about half of the
    layers, at Q6_K; a model of exactly eight experts gets attn_k and attn_v at Q8_0 and attn_output at Q5_K.
    """
    if format == "fp32" or len(shape) < 2 or "ffn_gate_inp" in name or "exp_probs_b" in name:
        return "F32"
    if format == "bf16":
        return "BF16"
    kind = "Q8_0"
    if format == "Q4_K_M":
        eighth = layers // 8
        more_bits = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        kind = "Q4_K"
        if "token_embd" in name:
            kind = "Q6_K" if shape[-1] % 256 == 0 else "Q8_0"
        elif experts == 8 and ("attn_k." in name or "attn_v." in name):
            kind = "Q8_0"
        elif experts == 8 and "attn_output" in name:
            kind = "Q5_K"
        elif more_bits and ("attn_v." in name or "ffn_down" in name):
            kind = "Q6_K"
    while shape[-1] % BLOCKS[kind][1]:
        kind = FALLBACK[kind]
    return kind
