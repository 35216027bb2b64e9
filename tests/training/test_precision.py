"""What `trainer.precision=auto` becomes."""

from __future__ import annotations

import time

import pytest
import torch

from elara.training import precision


def test_a_given_precision_is_kept() -> None:
    assert precision.resolve("16-mixed") == "16-mixed"
    assert precision.resolve(32) == "32"


@pytest.mark.parametrize(("speed", "expected"), [(4.2, "bf16-mixed"), (1.5, "32-true"), (0.3, "32-true")])
def test_auto_on_a_cpu_follows_the_measured_speed(monkeypatch: pytest.MonkeyPatch, speed: float, expected: str) -> None:
    monkeypatch.setattr(precision, "bf16_speed", lambda: speed)
    assert precision.resolve("auto", "cpu") == expected


@pytest.mark.parametrize("speed", [0.3, 4.2])
def test_ranks_do_not_measure_as_they_could_disagree(monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(precision, "bf16_speed", lambda: speed)
    knows = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert precision.resolve("auto", "cpu") == ("bf16-mixed" if knows else "32-true")


def test_auto_on_another_accelerator_takes_no_risk() -> None:
    assert precision.resolve("auto", "mps") == "32-true"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu_is_bf16_where_it_has_it() -> None:
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert precision.resolve("auto", "gpu") == ("bf16-mixed" if bf16 else "32-true")


def test_measuring_takes_no_time_to_speak_of() -> None:
    begin = time.perf_counter()
    assert precision.bf16_speed() > 0
    assert time.perf_counter() - begin < 2  # 20 ms on an idle machine
