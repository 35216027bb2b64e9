"""The scripts of experiments/training-speed that are meant for a GPU, as far as a CPU runs them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "training-speed"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", [(128, 4, 0.25, 4, 4, 64), (200, 8, 1.0, 4, 2, 16)], ids=str)
def test_flex_attention_gives_what_the_split_form_gives(
    shape: tuple[int, int, float, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("flex")
    assert module.largest_difference(*shape) < 2e-6


@pytest.mark.slow
def test_every_line_of_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--dry", "--out", str(tmp_path), "--sizes", "elara_2p8b"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert [run["section"] for run in found["runs"]] == [0.0, 0.25]
    assert all(run["last_loss"] < run["first_loss"] and run["flops_per_token"] > 0 for run in found["runs"])
    names = [figure["name"].partition(": ")[2] for figure in found["figures"]]
    assert any(name.startswith("MoE layer") for name in names) and "FlexAttention / split form" in names
    assert "| elara_2p8b | 0.25 |" in (tmp_path / "gpu.md").read_text("utf-8")
    assert (tmp_path / "elara_2p8b-tidar" / "table.txt").is_file()
