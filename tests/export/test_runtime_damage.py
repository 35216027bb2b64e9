"""elara/elara.py and files that are truncated, altered or made to harm: one clear error, never anything else."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from elara import checkpoint
from elara.elara import Elara, GGUFError
from elara.export.files import write_model
from elara.export.layout import COMPACT, UNROLLED
from elara.export.source import open_source
from elara.tokenizer.char import CharTokenizer
from tests.conftest import ROOT
from tests.export.conftest import MAKE, config, random_model
from tests.export.fuzz import attempt, changed, fuzz, header_size


@pytest.fixture
def good(make: MAKE, tmp_path: Path) -> Path:
    """A whole file of a few kilobytes, with every kind of tensor in it."""
    built = config(n_embd=32, model__n_head=2, model__n_kv_head=1, moe__num_experts=2, moe__top_k=1)
    write_model(tmp_path / "good.gguf", make(built, CharTokenizer("abc é\n")), COMPACT, "F32", None)
    return tmp_path / "good.gguf"


def test_a_whole_file_is_read(good: Path) -> None:
    assert not attempt(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"GGML" + data[4:], "no GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "no GGUF file of version 2 or 3"),
        (lambda data: data[:200], "truncated or damaged"),
        (lambda data: data[:-1000], "truncated or damaged"),
        (lambda data: data.replace(b"output_norm.weight", b"output_norn.weight"), "lacks the tensor output_norm"),
        (lambda data: data.replace(b"general.architecture", b"general.brchitecture"), "architecture is missing"),
        (lambda data: data[:8] + struct.pack("<Q", 2**62) + data[16:], "truncated or damaged|is missing"),
        (lambda data: data[:16] + struct.pack("<Q", 2**62) + data[24:], "truncated or damaged"),
    ],
    ids=["empty", "magic", "version", "header cut", "data cut", "tensor", "key", "tensors", "keys"],
)  # fmt: skip
def test_each_damage_has_its_sentence(good: Path, change, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        Elara.load(changed(good, change(good.read_bytes())))


def test_a_type_that_is_not_known_is_named(good: Path) -> None:
    data = good.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    with pytest.raises(GGUFError, match=r"token_embd.weight .* type 39"):
        Elara.load(changed(good, data[:at] + struct.pack("<I", 39) + data[at + 4 :]))


def rewritten(good: Path, keys: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """The same file with other values of keys and tensors, or some left out (None), by the package gguf."""
    reader, path = GGUFReader(good), good.with_name("rewritten.gguf")
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        value = keys.get(name, field.contents())
        if value is not None and not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    for name in keys.keys() - reader.fields.keys():
        writer.add_key_value(name, keys[name], kinds[type(keys[name])])
    found = {tensor.name: tensor.data for tensor in reader.tensors} | tensors
    for name, data in found.items():
        if data is not None:
            writer.add_tensor(name, np.array(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=[COMPACT, UNROLLED])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a compact and as an unrolled file."""
    folder, tokenizer = tmp_path_factory.mktemp("both"), CharTokenizer("abc é\n")
    built = config(n_embd=32, model__n_head=2, model__n_kv_head=1, moe__num_experts=2, moe__top_k=1, moe__every=1)
    checkpoint.save(folder / "checkpoint", random_model(built, tokenizer), tokenizer, meta={"step": 7})
    write_model(folder / "good.gguf", open_source(folder / "checkpoint"), request.param, "F32", None)
    return folder / "good.gguf"


ROW, SQUARE = np.ones(32), np.ones((32, 32))
MASK = {"tokenizer.ggml.token_type": [1] * 63 + [4]}


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"expert_used_count": 0}, {}, "expert_used_count is unusable: 0"),
        ({"expert_used_count": 3}, {}, "expert_used_count is unusable: 3"),
        ({"expert_gating_func": 1}, {}, "expert_gating_func is unusable: 1"),
        ({"expert_gating_func": 99}, {}, "expert_gating_func is unusable: 99"),
        ({"expert_weights_norm": False}, {}, "expert_weights_norm is unusable: False"),
        ({"expert_weights_norm": None}, {}, "expert_weights_norm is missing"),
        ({"expert_weights_scale": 0.0}, {}, "expert_weights_scale is unusable: 0.0"),
        ({"expert_shared_count": 2}, {}, "expert_shared_feed_forward_length is unusable: 32"),
        ({"expert_shared_count": 0}, {}, "its keys know no shared expert, and block 0 has one"),
        ({"block_count": 1}, {}, "it holds blk.1."),
        ({"block_count": 0}, {}, "block_count is unusable: 0"),
        ({"block_count": 9}, {}, "it lacks the tensor blk."),
        ({"attention.head_count_kv": 0}, {}, "head_count_kv is unusable: 0"),
        ({"attention.head_count": 3, "attention.head_count_kv": 2}, {}, "head_count_kv is unusable: 2"),
        ({"attention.value_length": 8}, {}, "value_length is unusable: 8"),
        ({"attention.sliding_window": 8}, {}, "attention.sliding_window, which this program does not know"),
        ({"attention.logit_softcapping": 30.0}, {}, "attention.logit_softcapping, which"),
        ({"rope.dimension_count": 8}, {}, "rope.dimension_count is unusable: 8"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "rope.scaling.(type|factor), which"),
        ({"rope.freq_base": 0.0}, {}, "rope.freq_base is unusable: 0.0"),
        ({"rope.freq_base": None, "rope.freq_bose": 500.0}, {}, "rope.freq_bose, which"),
        ({"vocab_size": 63}, {}, "vocab_size is unusable: 63"),
        ({"recursion.depth": 0}, {}, "recursion.depth is unusable: 0"),
        ({"recursion.order": "spiral"}, {}, "recursion.order is unusable: spiral"),
        ({"leading_dense_block_count": 1}, {}, "leading_dense_block_count, which"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, {}, "ggml.pre is unusable: llama-bpe"),
        ({"tokenizer.ggml.add_bos_token": True}, {}, "add_bos_token is unusable: True"),
        ({"tokenizer.ggml.add_eos_token": True}, {}, "add_eos_token, which"),
        ({"tokenizer.ggml.eot_token_id": 3}, {}, "eot_token_id, which"),
        (MASK, {}, "has some of other types"),
        ({}, {"blk.0.attn_output.bias": ROW}, "it holds blk.0.attn_output.bias, which"),
        ({}, {"blk.0.attn_k.bias": None}, None),
        ({}, {"blk.0.exp_probs_b": None}, "it lacks the tensor blk.0.exp_probs_b"),
        ({}, {"blk.0.ffn_gate_inp.bias": np.ones(2)}, "it holds blk.0.ffn_gate_inp.bias, which"),
        ({}, {"blk.0.post_ffw_norm.weight": ROW}, "it holds blk.0.post_ffw_norm.weight, which"),
        ({}, {"blk.0.ffn_gate.weight": SQUARE}, "it holds blk.0.ffn_gate.weight, which"),
        ({}, {"rope_freqs.weight": ROW[:8]}, "it holds rope_freqs.weight, which"),
        ({"general.note": "no matter", "other.key": 3}, {}, None),
    ],
    ids=lambda each: None if isinstance(each, str) else "-".join(each or [""]),
)
def test_what_would_be_computed_otherwise_than_the_file_says_is_refused(
    both: Path, keys: dict[str, Any], tensors: dict[str, Any], message: str | None
) -> None:
    arch = GGUFReader(both).fields["general.architecture"].contents()
    named = {name if name.startswith(("tokenizer.", "general.", "other.")) else f"{arch}.{name}": value
             for name, value in keys.items()}  # fmt: skip
    path = rewritten(both, named, tensors)
    if message is None:
        Elara.load(path, use_torch=False)
        return
    with pytest.raises(GGUFError, match=message) as caught:
        Elara.load(path, use_torch=False)
    assert "\n" not in str(caught.value)


def test_names_that_occur_twice_are_refused(good: Path) -> None:
    data = good.read_bytes()
    for one, other in ((b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), (b"general.name", b"general.type")):
        assert len(one) == len(other) and one in data and other in data
        with pytest.raises(GGUFError, match="have the same name"):
            Elara.load(changed(good, data.replace(one, other)))


def test_weights_that_are_no_numbers_are_refused(good: Path) -> None:
    data = bytearray(good.read_bytes())
    data[header_size(good) :] = np.full((len(data) - header_size(good)) // 4, np.nan, np.float32).tobytes()
    with pytest.raises(GGUFError, match="no numbers"), np.errstate(all="ignore"):
        list(Elara.load(changed(good, bytes(data)), use_torch=False).ids([0], 3))


@pytest.mark.slow
def test_hundreds_of_altered_headers(good: Path) -> None:
    assert fuzz(good, 400) > 100


@pytest.mark.long
def test_thousands_of_altered_headers_within_little_memory(good: Path) -> None:
    """In a process of its own, which may not take a gigabyte more than it has, nor more than two minutes."""
    command = [sys.executable, "tests/export/fuzz.py", str(good), "5000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1000
