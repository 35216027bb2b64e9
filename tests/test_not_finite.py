"""Every command that reads a checkpoint whose weights are nan says so in one line that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from elara import checkpoint, evaluate, sample
from elara.backends import Params
from elara.backends.elara import Elara
from elara.collect.student import Student
from elara.config import ElaraConfig, ModelConfig, TiDARConfig
from elara.errors import NotFinite
from elara.export import __main__ as export
from elara.model import ElaraLM
from elara.tokenizer.byte import ByteTokenizer

SAID = "nan or infinite"
ASKED = [{"role": "user", "content": "To be"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A text to evaluate on, and checkpoints of which a row of the embedding is nan, or one of the diffusion head."""
    path = tmp_path_factory.mktemp("nan")
    (path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    tokenizer = ByteTokenizer()
    size = ModelConfig(n_embd=32, n_head=2, hidden=64, vocab_size=320, context_length=64)
    for name in ("embedding", "diffusion"):
        torch.manual_seed(0)
        model = ElaraLM(ElaraConfig(size, tidar=TiDARConfig(block_length=4))).eval()
        with torch.no_grad():
            head = model.diffusion if name == "diffusion" else model.embed
            assert head is not None
            head.weight[100] = torch.nan
        checkpoint.save(path / name, model, tokenizer, meta={"step": 1})
    return path


@pytest.mark.parametrize("mode", ["ar", "auto", "diffusion"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_sample(in_process, home, mode, temperature):
    name = "diffusion" if mode == "diffusion" else "embedding"
    given = [f"checkpoint={name}", "prompt=To be", f"mode={mode}", f"temperature={temperature}"]
    code, _, err = in_process(sample.main, home, *given)
    err = re.sub(r"^reading .*\n", "", err)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {name}: ") and SAID in err


@pytest.mark.parametrize(("name", "overrides"), [
    ("embedding", []),
    ("diffusion", ["eval.precisions=[]", "eval.speed_rounds=0"]),
])  # fmt: skip
def test_evaluate(in_process, home, name, overrides):
    given = ["data=text", f"data.path={home / 'text.txt'}", f"checkpoint={name}", "eval.max_bytes=4000"]
    code, out, err = in_process(evaluate.main, home, *given, *overrides)
    assert code == 1
    assert f"error: {home / name}: " in err and SAID in err
    assert "100.00%" not in out


@pytest.mark.parametrize("form", ["gguf", "compact", "safetensors"])
def test_export(in_process, home, form):
    code, _, err = in_process(export.main, home, "checkpoint=embedding", f"format={form}", f"output={home / form}")
    err = re.sub(r"^reading .*\n", "", err)
    assert (code, err.count("\n")) == (1, 1)
    assert "'embed.weight' is nan or infinite in places" in err and "embedding" in err
    assert not [file for file in (home / form).rglob("*") if file.is_file()]


def test_the_elara_backend_names_it_and_serves_the_next_request(home):
    backend = Elara(str(home / "embedding"), device="cpu")
    with pytest.raises(NotFinite, match=rf"{home / 'embedding'}: .*{SAID}"):
        list(backend.generate(ASKED, Params(max_new_tokens=4)))
    with pytest.raises(NotFinite, match=SAID):
        list(backend.answers([ASKED], Params(max_new_tokens=4)))
    with pytest.raises(NotFinite, match=SAID):
        backend.embed(["d"])
    backend.close()


def test_nor_is_an_answer_judged_by_it(home):
    with pytest.raises(NotFinite, match=f"embedding: .*{SAID}"):
        Student(str(home / "embedding"), torch.device("cpu")).nats_per_byte(["To be"])
