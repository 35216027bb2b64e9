"""Types without llama.cpp's library, and what is said about those that need it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given
from hypothesis import strategies as st

from elara.errors import ElaraError
from elara.export.files import write_model
from elara.export.layout import COMPACT, UNROLLED
from elara.export.quantize import BF16, F16, F32, Encoder, check_type
from elara.tokenizer.byte import ByteTokenizer
from tests.export.conftest import MAKE, config

FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)


@given(FLOATS)
def test_bfloat16_is_rounded_as_the_gguf_package_rounds(values: list[float]) -> None:
    given_ = torch.tensor([values])
    encoder = Encoder(None)
    assert encoder.encode("x", given_, BF16).tobytes() == quants.quantize(given_.numpy(), BF16).tobytes()
    encoder.close()


@given(st.lists(st.floats(-65000, 65000, width=32), min_size=32, max_size=32))
def test_float16_is_rounded_as_the_gguf_package_rounds(values: list[float]) -> None:
    given_ = torch.tensor([values])
    encoder = Encoder(None)
    assert encoder.encode("x", given_, F16).tobytes() == quants.quantize(given_.numpy(), F16).tobytes()
    encoder.close()


def test_values_beyond_float16_are_refused() -> None:
    encoder = Encoder(None)
    with pytest.raises(ElaraError, match=r"beyond float16's range: take quantize=BF16"):
        encoder.encode("x", torch.full((2, 2), 1e6), F16)
    encoder.close()


@pytest.mark.parametrize("architecture", [UNROLLED, COMPACT])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_matrices_take_the_type_and_the_rest_stays_float32(
    make: MAKE, tmp_path: Path, kind: str, architecture: str
) -> None:
    write_model(tmp_path / "a.gguf", make(config(), ByteTokenizer()), architecture, kind, None)
    for tensor in GGUFReader(tmp_path / "a.gguf").tensors:
        plain = tensor.name.endswith((".bias", "exp_probs_b")) or "norm" in tensor.name or "gate_inp" in tensor.name
        better = kind == "Q4_0" and tensor.name in ("token_embd.weight", "diffusion.weight")
        assert tensor.tensor_type == (F32 if plain else GGMLQuantizationType["Q8_0" if better else kind]), tensor.name


def test_quantized_values_are_near_the_weights(make: MAKE, tmp_path: Path) -> None:
    source = make(config(), ByteTokenizer())
    for kind, bound in (("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 5e-3), ("Q4_0", 0.13)):
        write_model(tmp_path / "a.gguf", source, UNROLLED, kind, None)
        (tensor,) = [t for t in GGUFReader(tmp_path / "a.gguf").tensors if t.name == "blk.0.attn_q.weight"]
        weight = source.weights.read("blocks.0.attention.qkv.weight")[:64].numpy()
        error = np.abs(quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape) - weight).max()
        assert 0 < error < bound * np.abs(weight).max()


def test_rows_that_a_type_cannot_take_become_float16(make: MAKE, tmp_path: Path) -> None:
    write_model(tmp_path / "a.gguf", make(config(n_embd=48, moe=False), ByteTokenizer()), UNROLLED, "Q8_0", None)
    assert {tensor.tensor_type for tensor in GGUFReader(tmp_path / "a.gguf").tensors} == {F16, F32}


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S"])
def test_types_of_llama_cpp_alone_are_never_imitated(kind: str) -> None:
    with pytest.raises(ElaraError) as error:
        check_type(kind, None)
    assert "npm install" in str(error.value) and "quantize.library=" in str(error.value)
    assert "F32, F16, BF16, Q8_0, Q4_0 work without it" in str(error.value)


def test_a_difference_from_llama_cpp_s_own_mix_is_said() -> None:
    assert check_type("Q8_0", None) is None and check_type("F16", None) is None
    assert "without llama.cpp's library" in (check_type("Q4_0", None) or "")


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ElaraError, match=r"quantize.type=Q3_X must be one of: F32, F16"):
        check_type("Q3_X", None)
