"""Bytes of exported weights: against the model's own parameters, and llama.cpp's rules case by case."""

from dataclasses import replace

import pytest

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.model import ElaraLM
from elara.size.files import exported_tensors, file_bytes, tensor_type

NANO = ElaraConfig(
    ModelConfig(n_layer=4, n_embd=256, n_head=4, n_kv_head=2, hidden=512, expert_hidden=256, vocab_size=128),
    MoEConfig(num_experts=8),
    TRMConfig(depth=2),
    TiDARConfig(block_length=4),
)


@pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(num_experts=8), MoEConfig(num_experts=4, num_shared=0)])
@pytest.mark.parametrize("bias", [False, True])
def test_one_copy_in_fp32_is_the_model_without_its_diffusion_head(moe: MoEConfig, bias: bool) -> None:
    config = replace(NANO, moe=moe, model=replace(NANO.model, bias=bias))
    model = ElaraLM(config)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    exported = sum(tensor.nbytes for name, tensor in tensors.items() if "diffusion" not in name)
    assert file_bytes(config, "fp32", unrolled=False) == exported


@pytest.mark.parametrize("order", ["block", "stack"])
def test_unrolling_repeats_the_blocks_and_nothing_else(order: str) -> None:
    config = replace(NANO, trm=TRMConfig(depth=3, order=order))
    outside = 4 * (128 * 256 + 256 + 2 * 3 * 8)  # embedding, last norm, and the selection biases: one row per pass
    one = file_bytes(config, "fp32", unrolled=False)
    assert file_bytes(config, "fp32", unrolled=True) == 3 * (one - outside) + outside
    names = [name for name, _, _ in exported_tensors(config, unrolled=True)]
    assert len(set(names)) == len(names)
    experts = [layer for name, layer, _ in exported_tensors(config, unrolled=True) if "ffn_gate_inp" in name]
    assert experts == ([3, 4, 5, 9, 10, 11] if order == "block" else [1, 3, 5, 7, 9, 11])


def test_block_formats_by_hand() -> None:
    config = replace(NANO, moe=MoEConfig(), trm=TRMConfig(), model=replace(NANO.model, n_layer=1))
    vectors = 4 * (3 * 256 + 2 * 64)
    matrices = 128 * 256 + 256 * 256 * 2 + 2 * 128 * 256 + 3 * 512 * 256
    assert file_bytes(config, "Q8_0", unrolled=False) == vectors + matrices * 34 // 32
    assert file_bytes(config, "bf16", unrolled=False) == vectors + matrices * 2
    # a single layer counts as one of the last eighth: attn_v and ffn_down take Q6_K, as the embedding does
    q6 = 128 * 256 + 128 * 256 + 512 * 256
    assert file_bytes(config, "Q4_K_M", unrolled=False) == vectors + q6 * 210 // 256 + (matrices - q6) * 144 // 256


@pytest.mark.parametrize(
    ("name", "columns", "layer", "experts", "expected"),
    [
        ("token_embd.weight", 256, -1, 8, "Q6_K"),
        ("token_embd.weight", 288, -1, 8, "Q8_0"),
        ("blk.0.attn_norm.weight", None, 0, 8, "F32"),
        ("blk.0.ffn_gate_inp.weight", 256, 0, 8, "F32"),
        ("blk.0.attn_v.weight", 256, 0, 0, "Q6_K"),
        ("blk.5.attn_v.weight", 256, 5, 0, "Q4_K"),
        ("blk.5.attn_v.weight", 256, 5, 8, "Q8_0"),
        ("blk.5.attn_k.weight", 256, 5, 8, "Q8_0"),
        ("blk.5.attn_k.weight", 256, 5, 4, "Q4_K"),
        ("blk.5.attn_output.weight", 256, 5, 8, "Q5_K"),
        ("blk.5.attn_output.weight", 256, 5, 4, "Q4_K"),
        ("blk.6.ffn_down_exps.weight", 256, 6, 8, "Q6_K"),
        ("blk.7.ffn_down_exps.weight", 256, 7, 8, "Q4_K"),
        ("blk.28.ffn_down.weight", 256, 28, 8, "Q6_K"),
        ("blk.5.ffn_up.weight", 288, 5, 8, "Q5_0"),
        ("blk.6.ffn_down.weight", 288, 6, 8, "Q8_0"),
        ("blk.5.ffn_up.weight", 40, 5, 8, "F16"),
    ],
)
def test_q4_k_m_picks_types_as_llama_cpp(
    name: str, columns: int | None, layer: int, experts: int, expected: str
) -> None:
    shape = (64,) if columns is None else (64, columns)
    assert tensor_type(name, shape, "Q4_K_M", layer, 32, experts) == expected
