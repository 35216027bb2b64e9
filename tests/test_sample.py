"""`python -m elara.sample`: text to the terminal, then one line of figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from elara import checkpoint
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.decoding import SamplingConfig, generate, writable
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.sample import SampleConfig, sample
from elara.tokenizer.char import CharTokenizer
from tests import forks

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


@pytest.fixture(scope="session")
def headless(tmp_path_factory):
    """A model without diffusion head."""
    torch.manual_seed(0)
    config = ElaraConfig(ModelConfig(n_layer=1, n_embd=32, n_head=2, hidden=48, vocab_size=64, context_length=32))
    tokenizer = CharTokenizer("abc :\nROMEO")
    return checkpoint.save(tmp_path_factory.mktemp("plain") / "step-1", ElaraLM(config), tokenizer, meta={"step": 1})


def run(*overrides):
    return forks.run("elara.sample", *overrides)


def test_the_command_writes_text_and_figures(saved):
    results = [run(f"checkpoint={saved}", "prompt='ROMEO:'", "max_new_tokens=50", f"mode={m}") for m in ("ar", "tidar")]
    for result, mode in zip(results, ("ar", "tidar"), strict=True):
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("ROMEO:")
        assert result.stderr.startswith("reading ") and result.stderr.splitlines()[0].endswith(str(saved))
        figures = re.search(FIGURES, result.stdout)
        assert figures, result.stdout
        assert int(figures[1]) <= 50
        assert figures[3] == mode
        assert float(figures[2]) >= 1


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["temperature=-1"], "error: temperature=-1.0 must be 0 (greedy) or a positive number"),
        (["prompt='Zebra'"], "error: character 'Z'"),
        (["temperature=warm"], "error: "),
        (["mode=tidar", "checkpoint={headless}"], "error: mode=tidar needs a model with a diffusion head"),
    ],
)
def test_a_mistake_is_one_line(saved, headless, overrides, message):
    result = run(f"checkpoint={saved}", *(override.format(headless=headless) for override in overrides))
    assert result.returncode == 1
    assert result.stdout == ""
    error = re.sub(r"^reading .*\n", "", result.stderr)
    assert error.startswith(message)
    assert error.count("\n") == 1


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


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_depth_and_precision_reach_the_model(configured, capsys, precision):
    assert written(configured("depth=1", f"precision={precision}", "prompt=''"), capsys) is not None


@pytest.mark.thorough(5, "slow")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=int3", "precision=int3 must be one of: float32, bfloat16, int8, int4"),
        ("device=moon", "device=moon cannot be used here"),
        ("depth=0", "depth=0 must be at least 1"),
        ("mode=guess", "mode=guess must be one of: auto, ar, tidar, diffusion"),
        ("prompt=" + "a" * 33, "prompt 0 has 33 tokens, the model's context holds 32: shorten it"),
        ("temperature=nan", "temperature=nan must be 0 .greedy. or a positive number"),
        ("max_new_tokens=-3", "max_new_tokens=-3 must be at least 1"),
        ("top_k=-1", "top_k=-1 must be at least 1"),
        ("trust=1.5", "trust=1.5 must be between 0"),
        ("trust=-0.1", "trust=-0.1 must be between 0"),
        ("draft_length=400", "draft_length=400 must be at most 64"),
        ("seed=99999999999999999999", "seed=99999999999999999999 must fit into 64 bits"),
        ("overflow=error", "prompt 0 has 13 tokens and max_new_tokens=20, the model's context holds 32: ask for less"),
    ],
)
def test_refusals(configured, override, message, capsys):
    with pytest.raises(ElaraError, match=message) as error:
        sample(configured("mode=tidar", "prompt=RRRRRRRRRRRRR", override))
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize(
    "override",
    ["prompt=''", "prompt=" + "a" * 32, "temperature=0", "temperature=1e-320", "top_k=1000000", "seed=-1",
     "stop=[9999]", "draft_length=9", "groups=100", "depth=5"],
)  # fmt: skip
def test_extremes_are_defined(configured, override, capsys):
    assert written(configured("mode=tidar", override), capsys) is not None


def test_trust_is_said_to_be_lossy(configured, capsys):
    sample(configured("mode=tidar", "trust=1"))
    assert capsys.readouterr().out.endswith(", mode tidar, not the text of ar: trust is above 0]\n")


def test_a_model_without_a_diffusion_head_writes_by_itself(configured, headless, capsys):
    config = configured("temperature=0")
    config.checkpoint = str(headless)
    assert written(config, capsys).startswith("ROMEO:")
    config.mode = "diffusion"
    with pytest.raises(ElaraError, match="mode=diffusion needs a model with a diffusion head"):
        sample(config)


def test_without_a_model_the_way_to_one_is_told(configured, tmp_path, monkeypatch):
    monkeypatch.setattr("elara.runs.train_root", lambda: tmp_path)
    config = configured()
    config.checkpoint = None
    with pytest.raises(ElaraError, match=r" -m elara\.train"):
        sample(config)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """A model that was trained on conversations, says its checkpoint."""
    torch.manual_seed(0)
    config = ElaraConfig(ModelConfig(n_layer=1, n_embd=32, n_head=2, hidden=48, vocab_size=64, context_length=32))
    tokenizer = CharTokenizer("abc :\nROMEO:")
    return checkpoint.save(tmp_path_factory.mktemp("chat") / "step-1", ElaraLM(config), tokenizer, meta={"chat": True})


def test_a_chat_model_is_asked_and_only_its_reply_is_shown(configured, chatty, saved, capsys):
    config = configured("prompt='ROMEO:'", "max_new_tokens=12", "temperature=0", "mode=ar")
    texts = {}
    asked = [(chatty, None, None), (chatty, False, None), (chatty, None, "abc"), (saved, True, None)]
    for folder, chat, system in asked:
        config.checkpoint, config.chat, config.system = str(folder), chat, system
        sample(config)
        texts[folder, chat, system] = capsys.readouterr().out.rsplit("\n\n[", 1)[0]
    assert texts[chatty, False, None].startswith("ROMEO:"), "continued, not asked"
    assert not texts[chatty, None, None].startswith("ROMEO:")
    loaded = checkpoint.load(chatty)
    messages = [{"role": "system", "content": "abc"}, {"role": "user", "content": "ROMEO:"}]
    for before, key in ((messages, (chatty, None, "abc")), (messages[1:], (chatty, None, None))):
        ids, _ = loaded.tokenizer.apply_chat(before, generate=True)
        allowed = writable(loaded.tokenizer, 64)
        wanted = SamplingConfig(temperature=0, max_new_tokens=12, stop=[loaded.tokenizer.end_id])
        written = [t for step in generate(loaded.model, [ids], wanted, allowed=allowed) for t in step.tokens[0]]
        assert texts[key] == loaded.tokenizer.decode(written)
