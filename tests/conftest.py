"""What holds for every test: one thread per process, and no setting left over from another test."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors; before torch is imported, here and in child processes


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points that a test calls in this process switch Hydra's own error reports off through the environment."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
