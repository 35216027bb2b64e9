"""Every rule of the model's configuration refuses with one line that names the key."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.errors import ElaraError

GROUPS: dict[str, Any] = {"model": ModelConfig, "moe": MoEConfig, "trm": TRMConfig, "tidar": TiDARConfig}

BAD = [
    ("model.n_embd", {"n_embd": 100, "n_head": 8}),
    ("model.n_embd", {"n_embd": 12, "n_head": 4}),  # an odd head dimension has no rotary pairs
    ("model.n_kv_head", {"n_head": 4, "n_kv_head": 3}),
    ("model.dropout", {"dropout": 1.0}),
    ("model.dropout", {"dropout": -0.1}),
    ("model.vocab_size", {"vocab_size": 0}),
    ("moe.num_experts", {"num_experts": -1}),
    ("moe.top_k", {"num_experts": 4, "top_k": 5}),
    ("moe.top_k", {"num_experts": 4, "top_k": 0}),
    ("moe.num_shared", {"num_shared": -1}),
    ("moe.every", {"every": 0}),
    ("trm.depth", {"depth": 0}),
    ("trm.order", {"order": "spiral"}),
    ("trm.sample_depth", {"sample_depth": [3, 1]}),
    ("trm.sample_depth", {"sample_depth": [0, 2]}),
    ("trm.sample_depth", {"sample_depth": [2]}),
    ("tidar.block_length", {"block_length": 256}),
    ("tidar.block_length", {"block_length": -1}),
    ("tidar.block_fraction", {"block_fraction": 0.0}),
    ("tidar.block_fraction", {"block_fraction": 1.5}),
    ("tidar.schedule", {"schedule": "sine"}),
    *[("model: sizes", {key: 0}) for key in ("n_layer", "n_embd", "n_head", "hidden", "context_length")],
    ("model: sizes", {"n_kv_head": -2}),
]


def build(options):
    groups = {
        name: group(**{field.name: options[field.name] for field in fields(group) if field.name in options})
        for name, group in GROUPS.items()
    }
    return ElaraConfig(**groups)


@pytest.mark.parametrize(("key", "options"), BAD, ids=[f"{key} {options}" for key, options in BAD])
def test_a_bad_value_is_refused_by_name(key, options):
    with pytest.raises(ElaraError) as error:
        build(options)
    assert str(error.value).startswith(key)
    assert "\n" not in str(error.value)


def test_defaults_and_derived_values():
    config = build({"n_embd": 64, "n_head": 4, "hidden": 96, "n_layer": 5, "num_experts": 8})
    assert (config.head_dim, config.n_kv_head, config.expert_hidden) == (16, 4, 96)
    assert config.moe_layers == [1, 3]
    assert build({}).moe_layers == []


def test_a_vocabulary_must_be_known_to_build():
    with pytest.raises(ElaraError, match="vocab_size is not set"):
        _ = build({}).vocab_size


def test_round_trip():
    config = build({"n_embd": 64, "num_experts": 8, "sample_depth": [1, 4], "block_length": 4, "vocab_size": 65})
    assert ElaraConfig.from_dict(config.to_dict()) == config


def test_reading_names_what_is_wrong():
    data = build({}).to_dict()
    data["model"]["n_emdb"] = 3
    with pytest.raises(ElaraError, match=r"unknown key 'model\.n_emdb'"):
        ElaraConfig.from_dict(data)
    del data["model"]
    with pytest.raises(ElaraError, match="group 'model' is missing"):
        ElaraConfig.from_dict(data)


@pytest.mark.parametrize(
    ("group", "key", "value", "kind"),
    [
        ("model", "n_layer", "2", "int"), ("model", "n_layer", True, "int"), ("model", "bias", 1, "bool"),
        ("model", "vocab_size", 5.5, r"int \| None"), ("model", "dropout", "0.1", "float"), ("trm", "order", 3, "str"),
        ("trm", "sample_depth", [1, "2"], r"list\[int\] \| None"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(group: str, key: str, value: object, kind: str) -> None:
    data = ElaraConfig().to_dict()
    data[group][key] = value
    with pytest.raises(ElaraError, match=rf"{group}\.{key}=.* must be of kind {kind}$"):
        ElaraConfig.from_dict(data)
