"""`python -m elara.verify` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).parent.parent


def verify(*overrides: str) -> forks.Done:
    return forks.run("elara.verify", *overrides)


def counted(*overrides: str) -> dict:
    done = verify("json=true", *overrides)
    assert (done.returncode, done.stderr) == (0, "")
    report: dict = json.loads(done.stdout)
    return report


def test_the_seed_size_has_the_numbers_of_the_design() -> None:
    report = counted("model=elara_2p8b", "smoke=false")
    assert round(report["total"] / 1e9, 3) == 2.855
    assert round(report["without_diffusion_head"] / 1e9, 3) == 2.791
    assert round(report["active"] / 1e9, 3) == 1.281
    assert report["effective_layers"] == 64
    assert report["adamw_bytes"] == 16 * report["total"]
    assert report["kv_cache_bytes_per_token"]["bf16"] == 2 * 64 * 1280 * 2
    q4 = report["file_bytes"]["Q4_K_M"]
    assert q4["one_copy"] == pytest.approx(1.8e9, rel=0.05)
    assert q4["unrolled"] == pytest.approx(3.6e9, rel=0.05)


def test_smoke_check_runs_for_a_size_that_fits() -> None:
    smoke = counted()["smoke"]
    assert smoke["ar"] == pytest.approx(smoke["expected"], rel=0.05)
    assert smoke["diffusion"] == pytest.approx(smoke["expected"], rel=0.05)
    assert smoke["without_gradient"] == []


def test_tables_are_plain_when_piped() -> None:
    done = verify("model=elara_2p8b", "smoke=false")
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    rows = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines() if line}
    assert rows["all"][1:] == ["2,855,328,000", "1,280,989,440", "100.0%"]
    assert rows["without diffusion head"][3:] == ["2,790,938,880", "1,280,989,440", "97.7%"]
    assert "smoke check: not run (switched off)" in done.stdout


def test_a_model_that_cannot_train_fails_with_one_line() -> None:
    done = verify("model.init_std=0.5")
    assert done.returncode == 1
    assert "smoke check: failed" in done.stdout
    assert done.stderr.startswith("error: the initial AR loss")
    assert done.stderr.count("\n") == 1


def test_unknown_vocabulary_is_asked_for() -> None:
    done = verify("tokenizer=huggingface")
    assert done.returncode == 1
    assert "give model.vocab_size=N" in done.stderr


@pytest.mark.slow
def test_large_model_takes_less_work_than_importing_torch() -> None:
    """In processor time, the least of several in turn: other work may run on the machine."""

    def processor_time(*command: str) -> float:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    large = ("-m", "elara.verify", "model=elara_2p8b")
    times = [(processor_time(*large), processor_time("-c", "import torch")) for _ in range(3)]
    assert min(time for time, _ in times) < 2 * min(time for _, time in times)
