"""Costs of decoding steps: measured once for a model on a machine, kept, measured again when they cannot be read."""

from __future__ import annotations

import os

import pytest
import torch

from elara.calibration import controller_for
from elara.checkpoint import Loaded
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.decoding.controller import candidates
from elara.model import ElaraLM
from elara.tokenizer.char import CharTokenizer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ELARA_HOME", str(tmp_path))
    return tmp_path


def loaded(block_length=2):
    torch.manual_seed(0)
    sizes = ModelConfig(n_layer=1, n_embd=16, n_head=2, hidden=16, vocab_size=64, context_length=16)
    config = ElaraConfig(sizes, MoEConfig(num_experts=0), TRMConfig(depth=1), TiDARConfig(block_length=block_length))
    return Loaded(ElaraLM(config).eval(), CharTokenizer("abc\n"), config, {})


def costs(model, **options):
    controller = controller_for(model, **{"precision": "float32", **options})
    assert controller is not None
    return controller.costs


@pytest.mark.slow
def test_costs_are_kept_by_what_they_depend_on(home):
    model = loaded()
    first = costs(model)
    assert len(first.seconds) == len(candidates(2))
    assert costs(model) == first == costs(loaded()), "the same architecture has the same costs"
    others = [costs(model, batch=2), costs(model, depth=2), costs(model, precision="bfloat16"), costs(loaded(3))]
    assert len(list((home / "data" / "calibration").iterdir())) == 1 + len(others)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert costs(model) != first
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_damaged_file_is_measured_anew(home):
    model = loaded()
    costs(model)
    (file,) = (home / "data" / "calibration").iterdir()
    for damage in ("", '{"seconds": 3}', '{"seconds": [[1, 0]]}', '{"seconds": []}'):
        file.write_text(damage)
        again = costs(model)
        assert len(again.seconds) == len(candidates(2))
        assert costs(model) == again, "and mended"


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_nothing_else(home):
    (home / "data").write_text("a file where a folder should be")
    assert len(costs(loaded()).seconds) == len(candidates(2))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_nor_does_a_full_disk(home):
    model = loaded()
    costs(model)
    (file,) = (home / "data" / "calibration").iterdir()
    file.unlink()
    file.with_name(f".{file.name}.tmp").symlink_to("/dev/full")
    assert len(costs(model).seconds) == len(candidates(2))


def test_a_model_that_cannot_draft_needs_none(home):
    assert controller_for(loaded(0), precision="float32") is None
    assert not (home / "data").exists()
