"""`python -m elara.sample`: text to the terminal, then one line of figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from elara import checkpoint
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.sample import SampleConfig, sample
from elara.tokenizer.char import CharTokenizer

ROOT = Path(__file__).parents[1]
FIGURES = r"\n\n\[(\d+) tokens, [\d.]+ tokens/s, ([\d.]+) tokens per forward, mode (\w+)\]\n$"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abc :\nROMEO")
    config = ElaraConfig(
        ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=48, vocab_size=64, context_length=32),
        MoEConfig(num_experts=4),
        TRMConfig(depth=2),
        TiDARConfig(block_length=4),
    )
    return checkpoint.save(tmp_path_factory.mktemp("run") / "step-1", ElaraLM(config), tokenizer, meta={"step": 1})


def run(*overrides):
    command = [sys.executable, "-m", "elara.sample", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_writes_text_and_figures(saved):
    results = [run(f"checkpoint={saved}", "prompt='ROMEO:'", "max_new_tokens=50", f"mode={m}") for m in ("ar", "tidar")]
    for result, mode in zip(results, ("ar", "tidar"), strict=True):
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("ROMEO:")
        figures = re.search(FIGURES, result.stdout)
        assert figures, result.stdout
        assert int(figures[1]) <= 50
        assert figures[3] == mode
        assert float(figures[2]) >= 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["temperature=-1"], "error: temperature=-1.0 must be 0 (greedy) or a positive number"),
        (["prompt='Zebra'"], "error: character 'Z'"),
    ],
)
def test_a_mistake_is_one_line(saved, overrides, message):
    result = run(f"checkpoint={saved}", *overrides)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.fixture
def configured(saved):
    ConfigStore.instance().store(name="sample_schema", node=SampleConfig)

    def make(*overrides):
        with initialize_config_module("conf", version_base="1.3"):
            return compose("sample", [f"checkpoint={saved}", "max_new_tokens=20", *overrides])

    return make


def written(config, capsys):
    sample(config)
    out = capsys.readouterr().out
    figures = re.search(FIGURES, out)
    assert figures
    return out[: figures.start()]


def test_every_key_of_the_schema_is_explained_in_the_config():
    keys = set(OmegaConf.structured(SampleConfig)) - {"hydra"}
    lines = (ROOT / "conf" / "sample.yaml").read_text("utf-8").splitlines()
    explained = {line.split(":")[0] for line in lines if re.match(r"\w+: .*  # ", line)}
    assert explained == keys


def test_the_seed_repeats_the_text_and_modes_agree_greedily(configured, capsys):
    first, again, other = (written(configured(f"seed={seed}", "temperature=1"), capsys) for seed in (1, 1, 2))
    assert first == again != other
    ar, tidar = (written(configured(f"mode={mode}", "temperature=0"), capsys) for mode in ("ar", "tidar"))
    assert ar == tidar


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_depth_and_precision_reach_the_model(configured, capsys, precision):
    assert written(configured("depth=1", f"precision={precision}", "prompt=''"), capsys) is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=int3", "precision=int3 must be one of: float32, bfloat16, int8, int4"),
        ("device=moon", "device=moon cannot be used here"),
        ("depth=0", "depth=0 must be at least 1"),
        ("mode=guess", "mode=guess must be one of: auto, ar, tidar, diffusion"),
    ],
)
def test_refusals(configured, override, message):
    with pytest.raises(ElaraError, match=message):
        sample(configured(override))


def test_without_a_model_the_way_to_one_is_told(configured, tmp_path, monkeypatch):
    monkeypatch.setattr("elara.runs.train_root", lambda: tmp_path)
    config = configured()
    config.checkpoint = None
    with pytest.raises(ElaraError, match=r"python -m elara\.train"):
        sample(config)
