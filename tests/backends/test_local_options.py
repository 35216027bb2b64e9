"""The options of the group `teacher` that run in this process become backends, and name what is missing or wrong."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object, instantiate

from elara.cli import explain
from elara.errors import ElaraError
from tests.conftest import ROOT

LOCAL = ["airllm", "elara", "smollm2", "transformers"]


@pytest.mark.parametrize("option", LOCAL)
def test_every_key_is_an_argument_and_every_argument_a_key(option: str, tmp_path: Path) -> None:
    backend = yaml.safe_load((ROOT / "conf" / "teacher" / f"{option}.yaml").read_text("utf-8"))["backend"]
    arguments = inspect.signature(get_object(backend["_target_"])).parameters
    assert set(arguments) == set(backend) - {"_target_"}
    for name, argument in arguments.items():
        assert argument.default in (inspect.Parameter.empty, backend[name]), name
    if "model" in backend:
        with pytest.raises(Exception, match=rf"teachers\.{option}\.backend\.model=") as missing:
            instantiate(backend)
        assert "\n" not in explain(missing.value)
        backend["model"] = str(tmp_path)
    assert instantiate(backend).capabilities.logits
    with pytest.raises(Exception, match="batchsize") as typo:
        instantiate({**backend, "batchsize": 3})
    assert "unknown key" in explain(typo.value)
    with pytest.raises(Exception, match="batch_size=0") as wrong:
        instantiate({**backend, "batch_size": 0})
    assert "batch_size=0 must be at least 1" in explain(wrong.value)
    assert isinstance(wrong.value.__cause__, ElaraError)
