"""Layers read from disk give the very logits of the model in memory."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from elara.backends import BackendError, Params
from elara.backends.airllm import AirLLM
from elara.backends.transformers import Transformers
from elara.errors import ElaraError
from tests.backends.conftest import save_model

pytestmark = [
    pytest.mark.slow,  # importing it takes longer than a test
    pytest.mark.skipif(find_spec("airllm") is None, reason="airllm is not installed"),
]
CHATS = [[{"role": "user", "content": text}] for text in ("The bee", "found honey and 12 flowers", "x")]


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_same_model_and_its_folder_stays_as_it_was(
    tied: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=tied)
    before = state_of(folder)
    whole = Transformers(str(folder), device="cpu", dtype="float32")
    layers = AirLLM(str(folder), device="cpu", dtype="float32", shards=str(tmp_path / "shards"))
    ids = torch.randint(5, 320, (3, 60), generator=torch.Generator().manual_seed(0))
    want, have = whole.top_logprobs(ids, 320), layers.top_logprobs(ids, 320)
    assert torch.equal(have.ids, want.ids) and torch.equal(have.logprobs, want.logprobs)
    assert (layers.embed(["The bee", ""]) == whole.embed(["The bee", ""])).all()
    params = Params(temperature=0.9, max_new_tokens=6, seed=1, logprobs=2)
    assert dict(layers.answers(CHATS, params)) == dict(whole.answers(CHATS, params))
    assert layers.fingerprint == whole.fingerprint
    layers.close()
    assert "".join(layers.generate(CHATS[0], params)) == "".join(whole.generate(CHATS[0], params)), "opens again"
    layers.close()
    assert state_of(folder) == before
    assert capfd.readouterr().out == ""


def test_shards_of_a_model_are_not_taken_for_those_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELARA_HOME", str(tmp_path))
    ids = torch.tensor([[7, 8, 9]])
    found = []
    for seed in (0, 1):
        folder = save_model(tmp_path / "model", seed=seed)
        found.append(AirLLM(str(folder), device="cpu", dtype="float32").top_logprobs(ids, 4))
        want = Transformers(str(folder), device="cpu", dtype="float32").top_logprobs(ids, 4)
        assert torch.equal(found[-1].logprobs, want.logprobs)
    assert not torch.equal(found[0].logprobs, found[1].logprobs)
    assert len(list((tmp_path / "data" / "teachers" / "airllm").iterdir())) == 2


def test_code_of_a_models_folder_is_never_run(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    trap = tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Config: ...\nclass Tokens: ...\n")
    for name, entry in (
        ("config.json", {"AutoConfig": "theirs.Config"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["theirs.Tokens", None]}),
    ):
        about: dict[str, Any] = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**about, "auto_map": entry}))
    layers = AirLLM(str(folder), device="cpu", dtype="float32", shards=str(tmp_path / "shards"))
    assert layers.top_logprobs(torch.tensor([[7, 8]]), 2).ids.shape == (1, 2, 2)
    assert not trap.exists()


def test_what_it_cannot_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ElaraError, match=r"backend\.model="):
        AirLLM(None)
    with pytest.raises(ElaraError, match="compression=3bit"):
        AirLLM("model", compression="3bit")
    with pytest.raises(ElaraError, match="take teacher=transformers"):
        AirLLM("folder/model.gguf")
    folder = save_model(tmp_path / "model")
    with pytest.raises(BackendError, match="bitsandbytes") as error:
        AirLLM(str(folder), device="cpu", compression="4bit", shards=str(tmp_path)).embed(["x"])
    assert "\n" not in str(error.value)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackendError, match="no safetensors"):
        AirLLM(str(folder), device="cpu").embed(["x"])
