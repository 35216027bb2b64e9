"""GGUF files as the `gguf` package reads them back: keys, tensors, and nothing left behind when writing fails."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from elara import checkpoint, shards
from elara.errors import ElaraError
from elara.export.files import write_model
from elara.export.layout import COMPACT, UNROLLED, pieces
from elara.export.quantize import Encoder
from elara.export.source import open_source
from elara.export.vocabulary import vocabulary
from elara.tokenizer import Tokenizer
from elara.tokenizer.byte import ByteTokenizer
from tests.export.conftest import MAKE, config, random_model


def keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("architecture", [UNROLLED, COMPACT])
@pytest.mark.parametrize("order", ["block", "stack"])
def test_float32_comes_back_as_it_was(make: MAKE, tmp_path: Path, architecture: str, order: str) -> None:
    source = make(config(order=order, depth=3), ByteTokenizer())
    write_model(tmp_path / "a.gguf", source, architecture, "F32", None)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    state = source.weights.model().state_dict()
    for piece in pieces(source.config, architecture, 3):
        assert piece.weight is not None
        for name in piece.names:
            tensor = found.pop(name)
            assert tensor.tensor_type == GGMLQuantizationType.F32
            assert torch.equal(torch.from_numpy(np.array(tensor.data)), state[piece.weight][piece.index])
    assert not found


def test_the_file_says_what_it_is(make: MAKE, tmp_path: Path) -> None:
    meta = {"step": 7, "commit": "abc", "data": "bees", "chat": True}
    source = make(config(order="stack", moe__gate_scale=2.5), ByteTokenizer(), meta, name="Bee", license="cc0-1.0")
    write_model(tmp_path / "a.gguf", source, UNROLLED, "F16", None)
    found = keys(tmp_path / "a.gguf")
    expected = {
        "general.architecture": "hy_v3", "general.name": "Bee", "general.license": "cc0-1.0", "general.file_type": 1,
        "general.parameter_count": sum(p.numel() for p in source.weights.model().parameters()),
        "general.quantization_version": 2, "hy_v3.block_count": 4, "hy_v3.context_length": 128,
        "hy_v3.embedding_length": 64, "hy_v3.feed_forward_length": 64, "hy_v3.attention.head_count": 4,
        "hy_v3.attention.head_count_kv": 2, "hy_v3.attention.key_length": 16, "hy_v3.attention.value_length": 16,
        "hy_v3.rope.dimension_count": 16, "hy_v3.rope.freq_base": 10000.0, "hy_v3.expert_count": 4,
        "hy_v3.expert_used_count": 2, "hy_v3.expert_shared_count": 1, "hy_v3.expert_feed_forward_length": 64,
        "hy_v3.expert_shared_feed_forward_length": 64, "hy_v3.expert_gating_func": 2,
        "hy_v3.expert_weights_norm": True, "hy_v3.expert_weights_scale": 2.5, "hy_v3.vocab_size": 320,
        "elara.recursion.depth": 2, "elara.recursion.order": "stack", "elara.commit": "abc", "elara.data": "bees",
        "elara.step": 7, "elara.tokenizer": "byte", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 261, "tokenizer.ggml.eos_token_id": 261, "tokenizer.ggml.mask_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert found["hy_v3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "<|assistant|>" in str(found["tokenizer.chat_template"])


def test_a_compact_file_says_how_to_recurse_and_draft(make: MAKE, tmp_path: Path) -> None:
    source = make(config(order="stack"), ByteTokenizer(), depth=3)
    write_model(tmp_path / "a.gguf", source, COMPACT, "F16", None)
    found = keys(tmp_path / "a.gguf")
    expected = {"general.architecture": "elara", "elara.block_count": 2, "elara.recursion.depth": 3,
                "elara.recursion.order": "stack", "elara.tidar.block_length": 4,
                "elara.tidar.draft_routing": "anchor"}  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert "tokenizer.chat_template" not in found


def test_a_dense_model_has_no_experts(make: MAKE, tmp_path: Path) -> None:
    write_model(tmp_path / "a.gguf", make(config(moe=False), ByteTokenizer()), UNROLLED, "F16", None)
    found = keys(tmp_path / "a.gguf")
    assert "hy_v3.expert_count" not in found and found["hy_v3.expert_feed_forward_length"] == 64


def test_shards_give_the_same_file(make: MAKE, tmp_path: Path) -> None:
    source = make(config(), ByteTokenizer())
    write_model(tmp_path / "a.gguf", source, UNROLLED, "Q8_0", None)

    def write_shards(trainer: Path) -> dict[str, torch.Tensor]:
        shards.write(trainer.parent / checkpoint.SHARDS, source.weights.model().state_dict())
        return {}

    folder = tmp_path / "sharded"
    checkpoint.save(
        folder, source.weights.model(), source.tokenizer, meta={"step": 7, "name": "checkpoint"},
        trainer_state=write_shards,
    )  # fmt: skip
    assert not (folder / checkpoint.WEIGHTS).exists()
    write_model(tmp_path / "b.gguf", open_source(folder), UNROLLED, "Q8_0", None)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_every_weight_is_made_once_and_one_at_a_time(
    make: MAKE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    encode = Encoder.encode

    def count(self: Encoder, name: str, values: torch.Tensor, kind: GGMLQuantizationType) -> object:
        made.append(name)
        return encode(self, name, values, kind)

    monkeypatch.setattr(Encoder, "encode", count)
    source = make(config(depth=3), ByteTokenizer())
    write_model(tmp_path / "a.gguf", source, UNROLLED, "F16", None)
    assert made == [piece.names[0] for piece in pieces(source.config, UNROLLED, 3)]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Files may have 100 kB: what is longer fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing(make: MAKE, tmp_path: Path) -> None:
    source = make(config(), ByteTokenizer())
    target = tmp_path / "out" / "a.gguf"
    with full_disk(), pytest.raises(ElaraError, match=r"cannot write .*a\.gguf: .*make room or give output=PATH"):
        write_model(target, source, UNROLLED, "F32", None)
    assert list(target.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(make: MAKE, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ElaraError, match=r"cannot write .*: (Not a directory|File exists)"):
        write_model(tmp_path / "file" / "a.gguf", make(config(), ByteTokenizer()), UNROLLED, "F32", None)


def test_an_older_file_stays_until_the_new_one_is_whole(make: MAKE, tmp_path: Path) -> None:
    target = tmp_path / "out" / "a.gguf"
    source = make(config(), ByteTokenizer())
    write_model(target, source, UNROLLED, "F32", None)
    whole = target.read_bytes()

    with full_disk(), pytest.raises(ElaraError, match="cannot write"):
        write_model(target, source, UNROLLED, "F16", None)
    assert list(target.parent.iterdir()) == [target] and target.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "depth", "message"),
    [
        ({}, 300, "unrolled this model has 600 layers and llama.cpp takes 512"),
        ({"moe__num_experts": 600}, 1, "llama.cpp takes 512 experts and this model has 600"),
    ],
)
def test_what_llama_cpp_cannot_load_is_refused(
    make: MAKE, tmp_path: Path, options: dict[str, Any], depth: int, message: str
) -> None:
    source = make(config(n_embd=16, **options), ByteTokenizer(), depth=depth)
    with pytest.raises(ElaraError, match=message):
        write_model(tmp_path / "a.gguf", source, UNROLLED, "F32", None)


def test_a_depth_below_one_is_refused(make: MAKE) -> None:
    with pytest.raises(ElaraError, match="depth=0 must be at least 1"):
        make(config(), ByteTokenizer(), depth=0)


@pytest.mark.parametrize("kind", ["char", "byte", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_tokens_are_written_as_the_tables_have_them(
    make: MAKE, tmp_path: Path, tokenizers: Callable[[str], Tokenizer], kind: str
) -> None:
    source = make(config(n_embd=16, moe=False), tokenizers(kind))
    write_model(tmp_path / "a.gguf", source, COMPACT, "F16", None)
    tables, found = vocabulary(source.tokenizer, source.config.vocab_size), keys(tmp_path / "a.gguf")
    assert found["tokenizer.ggml.tokens"] == tables.tokens
    assert found["tokenizer.ggml.token_type"] == tables.types
    assert found["tokenizer.ggml.merges"] == tables.merges


class TestHostileCheckpoints:
    """A folder that is damaged or does not fit its config: one line, before anything is written."""

    def test_altered_weights(self, make: MAKE) -> None:
        folder = make(config(), ByteTokenizer()).folder
        with open(folder / checkpoint.WEIGHTS, "r+b") as file:
            file.seek(-5, 2)
            file.write(b"x")
        with pytest.raises(ElaraError, match="checksum"):
            open_source(folder)

    def test_weights_of_another_size(self, make: MAKE) -> None:
        folder = make(config(), ByteTokenizer()).folder
        text = (folder / checkpoint.CONFIG).read_text()
        (folder / checkpoint.CONFIG).write_text(text.replace('"n_layer": 2', '"n_layer": 3'))
        with pytest.raises(ElaraError, match=r"no weight 'blocks\.2\."):
            open_source(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_of_a_diverged_training(self, tmp_path: Path, value: float) -> None:
        tokenizer = ByteTokenizer()
        model = random_model(config(), tokenizer)
        with torch.no_grad():
            model.blocks[0].get_submodule("attention.out").get_parameter("weight")[3, 4] = value
        checkpoint.save(tmp_path / "c", model, tokenizer, meta={"step": 1})
        with pytest.raises(ElaraError, match=r"'blocks\.0\.attention\.out\.weight' is nan or infinite"):
            write_model(tmp_path / "a.gguf", open_source(tmp_path / "c"), UNROLLED, "F32", None)
        assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".a*"))

    def test_no_weights(self, make: MAKE) -> None:
        folder = make(config(), ByteTokenizer()).folder
        (folder / checkpoint.WEIGHTS).unlink()
        with pytest.raises(ElaraError, match=r"model\.safetensors is missing"):
            open_source(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_at_a_few_tensors(tmp_path: Path) -> None:
    """A file of 250 MB from a mapped checkpoint: what the process holds of its own grows by a few stacks of experts."""
    tokenizer = ByteTokenizer()
    built = config(n_embd=512, model__n_layer=8, moe__num_experts=8, model__expert_hidden=512, tidar__block_length=0)
    checkpoint.save(tmp_path / "c", random_model(built, tokenizer), tokenizer, meta={"step": 1})
    source = open_source(tmp_path / "c")
    peaks: list[int] = []

    def own() -> int:
        """Bytes that are no file's."""
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * resource.getpagesize()

    before, encode = own(), Encoder.encode

    def watch(self: Encoder, *arguments: object) -> object:
        made = encode(self, *arguments)  # type: ignore[arg-type]
        peaks.append(own())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "encode", watch)
        write_model(tmp_path / "a.gguf", source, UNROLLED, "F32", None)
    grown = max(peaks) - before
    stack = 4 * 8 * 512 * 512
    assert (tmp_path / "a.gguf").stat().st_size > 20 * stack and grown < 6 * stack, f"{grown / 1e6:.0f} MB"
