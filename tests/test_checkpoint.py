"""Checkpoint folders: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elara import checkpoint, shards
from elara import tokenizer as tokenizers
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer, TokenizerConfig


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return tokenizers.build(TokenizerConfig(kind="char"), lambda: ["the queen bee"], cache=tmp_path)


def make_model(seed: int = 0, n_embd: int = 32) -> ElaraLM:
    torch.manual_seed(seed)
    config = ElaraConfig(
        ModelConfig(n_layer=2, n_embd=n_embd, n_head=2, hidden=48, vocab_size=64, context_length=32),
        MoEConfig(num_experts=4, bias_update_rate=0.01),
        TRMConfig(depth=2),
        TiDARConfig(block_length=4),
    )
    model = ElaraLM(config)
    for name, buffer in model.named_buffers():
        buffer.normal_()
        assert "selection_bias" in name
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return checkpoint.save(tmp_path / "step-7", make_model(), tokenizer, meta={"step": 7, "parent": None})


def test_what_is_saved_comes_back_bit_for_bit(saved: Path, tokenizer: Tokenizer) -> None:
    model, loaded = make_model(), checkpoint.load(saved)
    assert loaded.config == model.config
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert loaded.meta["step"] == 7 and loaded.meta["format_version"] == 1
    for (name, want), (other, have) in zip(
        model.state_dict().items(), loaded.model.state_dict().items(), strict=True
    ):  # fmt: skip
        assert name == other and torch.equal(want, have)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).hidden, loaded.model(tokens).hidden)
    assert not loaded.model.training


def test_another_precision_leaves_the_router_in_float32(saved: Path) -> None:
    model = checkpoint.load(saved, precision="bfloat16").model
    kinds = {name: value.dtype for name, value in model.state_dict().items()}
    assert kinds["embed.weight"] == torch.bfloat16
    assert kinds["blocks.1.mlp.router.weight"] == kinds["blocks.1.mlp.router.selection_bias"] == torch.float32


def test_bfloat16_weights_are_stored_as_float32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = make_model().bfloat16()
    loaded = checkpoint.load(checkpoint.save(tmp_path / "c", model, tokenizer, meta={}))
    assert loaded.model.embed.weight.dtype == torch.float32
    assert torch.equal(loaded.model.embed.weight, model.embed.weight.float())


def test_saving_again_replaces_the_folder(saved: Path, tokenizer: Tokenizer) -> None:
    other = make_model(seed=1)
    checkpoint.save(saved, other, tokenizer, meta={"step": 7})
    assert torch.equal(checkpoint.load(saved).model.embed.weight, other.embed.weight)
    assert [path.name for path in saved.parent.glob("*step-7*")] == ["step-7"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "meta.json", "tokenizer"])
def test_a_missing_part_is_named(saved: Path, name: str) -> None:
    (saved / name).rename(saved / "elsewhere")
    with pytest.raises(ElaraError, match=f"is not a whole checkpoint: {name} is missing"):
        checkpoint.load(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000])
def test_truncated_weights_are_refused(saved: Path, keep: int) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ElaraError, match=r"model\.safetensors is damaged"):
        checkpoint.load(saved)


def test_one_flipped_bit_is_noticed(saved: Path) -> None:
    weights = saved / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 4
    weights.write_bytes(data)
    with pytest.raises(ElaraError, match=r"model\.safetensors is damaged: its checksum differs"):
        checkpoint.load(saved)


def test_garbage_without_a_checksum_is_refused(saved: Path) -> None:
    meta = json.loads((saved / "meta.json").read_text())
    del meta["crc32"]
    (saved / "meta.json").write_text(json.dumps(meta))
    (saved / "model.safetensors").write_bytes(b"no tensors here" * 100)
    with pytest.raises(ElaraError, match=r"model\.safetensors is damaged"):
        checkpoint.load(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    meta = json.loads((saved / "meta.json").read_text())
    (saved / "meta.json").write_text(json.dumps({**meta, "format_version": 2}))
    with pytest.raises(ElaraError, match="has format_version 2, this program reads up to 1"):
        checkpoint.load(saved)


def test_another_architecture_is_named_by_its_first_weight_that_does_not_fit(saved: Path) -> None:
    state = checkpoint.read_weights(saved, checkpoint.read_meta(saved))
    with pytest.raises(ElaraError, match=r"'embed\.weight' is \(64, 32\) there and \(64, 48\) here"):
        checkpoint.fit(saved, state, make_model(n_embd=48))
    del state["blocks.1.mlp.router.weight"]
    with pytest.raises(ElaraError, match=r"it has no weight 'blocks\.1\.mlp\.router\.weight'"):
        checkpoint.fit(saved, state, make_model())


def test_architectures_are_compared_without_settings_of_training() -> None:
    config = make_model().config
    freer = dataclasses.replace(config, tidar=dataclasses.replace(config.tidar, block_fraction=0.5))
    checkpoint.same_architecture(Path("c"), config, freer)
    deeper = dataclasses.replace(config, trm=dataclasses.replace(config.trm, depth=3))
    with pytest.raises(ElaraError, match=r"c has another architecture: trm\.depth is 2 there and 3 here"):
        checkpoint.same_architecture(Path("c"), config, deeper)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_come_one_by_one_as_well(saved: Path, tokenizer: Tokenizer, tmp_path: Path, sharded: bool) -> None:
    wanted = make_model().state_dict()
    if sharded:

        def write_shards(trainer: Path) -> Mapping[str, Tensor]:
            shards.write(trainer.parent / "shards", wanted)
            return {}

        saved = checkpoint.save(tmp_path / "s", make_model(), tokenizer, meta={}, trainer_state=write_shards)
    weights = checkpoint.Weights(saved, checkpoint.read_meta(saved), checkpoint.read_config(saved))
    assert weights.shapes == {name: tuple(value.shape) for name, value in wanted.items()}
    for name, value in wanted.items():
        assert torch.equal(weights.read(name), value) and torch.equal(weights.model().state_dict()[name], value)


def test_single_weights_are_checked_before_the_first_is_read(saved: Path) -> None:
    meta, config = checkpoint.read_meta(saved), checkpoint.read_config(saved)
    with pytest.raises(ElaraError, match=r"does not fit this model: 'embed\.weight' is \(64, 32\) there"):
        checkpoint.Weights(saved, meta, make_model(n_embd=64).config)
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ElaraError, match="checksum"):
        checkpoint.Weights(saved, meta, config)
    with pytest.raises(ElaraError, match="damaged"):
        checkpoint.Weights(saved, {}, config)


def test_a_swapped_tokenizer_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tokenizers.build(TokenizerConfig(kind="char"), lambda: ["a drone"], cache=tmp_path)
    (saved / "tokenizer").rename(saved / "old")
    other.save(saved / "tokenizer")
    with pytest.raises(ElaraError, match="is not the tokenizer of these weights"):
        checkpoint.load(saved)


def test_an_unknown_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ElaraError, match="there is no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere")


def test_a_crash_while_saving_leaves_nothing_and_keeps_the_old_one(saved: Path, tokenizer: Tokenizer) -> None:
    def crash(path: Path) -> Mapping[str, Tensor]:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, make_model(seed=1), tokenizer, meta={}, trainer_state=crash)
    assert torch.equal(checkpoint.load(saved).model.embed.weight, make_model().embed.weight)
    assert [path.name for path in saved.parent.glob("*step-7*")] == ["step-7"]


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(ElaraError, match=r"cannot write the checkpoint .* then continue with resume=auto"):
            checkpoint.save(tmp_path / "step-1", make_model(), tokenizer, meta={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*step-1*"))


def test_links_are_swapped_and_relative(saved: Path) -> None:
    (saved.parent / "step-9").mkdir()
    name = saved.parent / "last"
    checkpoint.link(saved, name)
    checkpoint.link(saved.parent / "step-9", name)
    assert name.readlink() == Path("step-9")


def test_shards_beside_whole_weights_are_refused(saved: Path) -> None:
    """They would be read in their place, though nothing was saved so."""
    shards.write(saved / "shards", make_model(seed=1).state_dict())
    with pytest.raises(ElaraError, match=r"holds both model\.safetensors and shards/: remove the one"):
        checkpoint.load(saved)
