"""`python -m elara.evaluate`: checkpoints side by side, from the command line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from elara import checkpoint
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.evaluate import EvaluateConfig
from elara.model import ElaraLM
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer
from tests import forks

ROOT = Path(__file__).parents[1]
QUICK = ["eval.max_bytes=400", "eval.passage=100", "eval.prompts=2", "eval.prompt_tokens=8", "eval.new_tokens=8",
         "eval.speed_rounds=1", "device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A project root with two checkpoints and a text."""
    home = tmp_path_factory.mktemp("home")
    (home / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    for name, tokenizer in (("chars", CharTokenizer("abcdefghijklmnopqrstuvwxyz \n")), ("bytes", ByteTokenizer())):
        torch.manual_seed(0)
        config = ElaraConfig(
            ModelConfig(n_layer=2, n_embd=32, n_head=2, hidden=32, context_length=32,
                        vocab_size=-(-tokenizer.vocab_size // 64) * 64),
            MoEConfig(num_experts=4), TRMConfig(depth=2), TiDARConfig(block_length=4),
        )  # fmt: skip
        run = home / "outputs" / "train" / name / "2030-01-01"
        (run / ".hydra").mkdir(parents=True)
        data = {"name": "mine", "source": "text", "path": str(home / "corpus.txt")}
        (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        checkpoint.save(run / "checkpoints" / "step-1", ElaraLM(config), tokenizer, meta={"step": 1})
    return home


def run(home, *overrides):
    environment = {**os.environ, "ELARA_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return forks.run("elara.evaluate", *overrides, cwd=home, env=environment)


@pytest.mark.slow
def test_two_checkpoints_are_compared_on_the_data_of_the_first(home):
    done = run(home, "checkpoint=[chars,bytes]", *QUICK)
    assert done.returncode == 0, done.stderr
    first = done.stderr.splitlines()[0]
    assert re.fullmatch(r"reading \S+chars/\S+/step-1, \S+bytes/\S+/step-1", first), first
    for words in ("chars/step-1", "bytes/step-1", "held-out part of mine", "bits per byte", "tokens/s, ar float32"):
        assert words in done.stdout
    written = re.search(r"written: (\S+)/evaluation\.json", done.stdout)
    assert written
    folder = Path(written[1])
    assert folder.parent == home / "outputs" / "evaluate"
    found = json.loads((folder / "evaluation.json").read_text())
    first, second = found["results"]
    assert first["loss"]["bytes"] == second["loss"]["bytes"] == found["text"]["bytes"]
    assert 340 <= found["text"]["bytes"] <= 460, "passages are kept whole"
    assert first["loss"]["bits_per_byte"] > 1
    assert found["eval"]["passage"] == 100
    assert (folder / "evaluation.png").stat().st_size > 10_000


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer=byte"], "tokenizer=byte: text is always read by the checkpoint's own tokenizer"),
        (["data.path=x"], "data.path=x needs the data group it belongs to"),
        (["eval.precisions=[int3]"], "int3 must be one of"),
    ],
)
def test_a_mistake_is_one_line(home, overrides, message):
    done = run(home, "checkpoint=chars", *overrides)
    assert done.returncode == 1
    assert done.stdout == ""
    error = re.sub(r"^reading .*\n", "", done.stderr)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not any(folder for folder in (home / "outputs").glob("evaluate/*") if not any(folder.iterdir()))


@pytest.mark.long
def test_fewer_bits_hardly_cost_a_trained_model(tmp_path):
    """From training to figures: within 0.02 nats of float32 in every precision, by paired difference."""
    environment = {**os.environ, "ELARA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = ["experiment=elara_char", "trainer.max_steps=200", "trainer=cpu"]
    done = forks.run("elara.train", *command, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    wanted = ["eval.precisions=[bfloat16,int8,int4]", "eval.prompts=0", "eval.max_bytes=32768", "device=cpu"]
    done = run(tmp_path, "checkpoint=elara_char", *wanted)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "outputs" / "evaluate").glob("*/evaluation.json")
    (result,) = json.loads(file.read_text())["results"]
    assert result["loss"]["loss"] < 2.2, "trained, not random"
    costs = {one["precision"]: one["difference"] for one in result["agreement"]}
    assert costs.keys() == {"bfloat16", "int8", "int4"}
    assert all(0 < abs(cost) < 0.02 for cost in costs.values()), costs


def test_every_key_is_in_the_schema_and_explained():
    given = yaml.safe_load((ROOT / "conf" / "evaluate.yaml").read_text("utf-8"))
    schema: Any = OmegaConf.to_container(OmegaConf.structured(EvaluateConfig))
    assert given["eval"] == schema["eval"], "every key with the default of the library"
    assert given.keys() - {"defaults", "hydra"} == schema.keys() - {"data", "tokenizer"}
