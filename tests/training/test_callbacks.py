"""What a run leaves behind, and the callbacks' own arithmetic."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elara import checkpoint
from elara.config import ElaraConfig, ModelConfig, MoEConfig, TiDARConfig, TRMConfig
from elara.model import ElaraLM
from elara.report.measures import clock
from elara.runs import Run
from elara.training.callbacks.exact_resume import random_state, set_random_state
from elara.training.callbacks.progress import figures_line
from elara.training.callbacks.samples import last_sample, write_samples
from elara.training.callbacks.throughput import flops_per_token, peak_flops
from elara.training.loggers import Monitor
from tests.conftest import PYTHON


@pytest.fixture(scope="session")
def finished(session_home) -> tuple[Run, str]:
    """A run that validated four times, and what it printed."""
    often = ["trainer.max_steps=14", "trainer.val_check_interval=4", "callbacks.progress.every=0"]
    done = session_home.call(*session_home.tiny("name=left", *often, plots=True))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return Run(session_home.only_run("left")), done.stdout


def test_a_run_folder_holds_what_it_should(finished: tuple[Run, str]) -> None:
    run, _ = finished
    for name in ("config.yaml", "metrics.csv", "samples.txt", "summary.json"):
        assert (run.path / name).is_file(), name
    assert {path.name for path in run.plots.iterdir()} == {"loss.png", "training.png", "experts.png", "acceptance.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.plots.iterdir())


def test_the_summary_tells_figures_code_and_machine(finished: tuple[Run, str]) -> None:
    summary = finished[0].read_summary()
    assert summary["finished"] is True and summary["steps"] == 14
    wanted = {"val/loss_ar", "val/perplexity", "val/bits_per_char", "train/lr", "train/grad_norm"}
    assert wanted <= set(summary["metrics"])
    assert summary["versions"]["torch"] == torch.__version__ or summary["versions"]["torch"] in torch.__version__
    assert summary["hardware"]["cores"] >= 1 and summary["wall_seconds"] > 0
    assert "commit" in summary and summary["precision"] == "32-true"


def test_the_last_step_is_validated_even_off_the_interval(finished: tuple[Run, str], session_home) -> None:
    rows = session_home.rows(finished[0].path)
    assert [int(row["step"]) for row in rows if row["val/loss_ar"]] == [4, 8, 12, 14]


def test_best_last_and_the_newest_are_kept_and_best_is_the_lowest_loss(finished: tuple[Run, str], session_home) -> None:
    run = finished[0]
    losses = {int(row["step"]): float(row["val/loss_ar"]) for row in session_home.rows(run.path) if row["val/loss_ar"]}
    best = min(losses, key=lambda step: losses[step])
    assert run.best.readlink() == Path(f"step-{best}") and run.last.readlink() == Path("step-14")
    assert {path.name for path in run.checkpoints()} == {f"step-{step}" for step in {best, 12, 14}}
    meta = checkpoint.read_meta(run.best)
    assert meta["metrics"]["val/loss_ar"] == pytest.approx(losses[best]) and meta["validation_due"] is False


def test_stdout_shows_progress_and_ends_with_what_to_do_next(finished: tuple[Run, str]) -> None:
    run, out = finished
    assert re.search(r"^step 5/14  train loss \d.* tokens/s  \d:\d\d left$", out, re.MULTILINE)
    assert re.search(r"^step 12  val loss \d\.\d+ \(ar \d\.\d+, diffusion \d\.\d+\)$", out, re.MULTILINE)
    assert "done: 14 steps, held-out loss" in out and "bits/character" in out
    assert out.rstrip().splitlines()[-1].startswith(f"next: {PYTHON} -m elara.sample checkpoint=outputs/train/left/")


@pytest.mark.slow
def test_debug_goes_through_everything(session_home) -> None:
    done = session_home.call("experiment=debug", "data=text", f"data.path={session_home.text}")
    assert done.returncode == 0, done.stderr
    run = Run(session_home.only_run("debug"))
    assert "done: 6 steps" in done.stdout and [path.name for path in run.checkpoints()] == ["step-6", "step-3"]
    assert {path.stem for path in run.plots.glob("*.png")} == {"loss", "training", "experts", "acceptance"}
    assert run.samples.read_text("utf-8").count("step ") >= 2 and run.finished


def test_samples_are_written_at_every_validation(finished: tuple[Run, str]) -> None:
    text = finished[0].samples.read_text("utf-8")
    assert re.findall(r"==== step (\d+) ====", text) == ["4", "8", "12", "14"]


def test_samples_after_a_resume_replace_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    for step in (10, 20, 30):
        write_samples(path, step, [f"text {step}", "second"])
    write_samples(path, 20, ["anew"])
    assert path.read_text("utf-8") == "==== step 10 ====\ntext 10\n----\nsecond\n\n==== step 20 ====\nanew\n\n"
    assert last_sample(path) == "anew"
    assert last_sample(tmp_path / "none.txt") == ""


@pytest.mark.slow
def test_a_run_without_callbacks_leaves_only_its_figures(home) -> None:
    options = home.tiny("name=bare", "callbacks=minimal", "+callbacks.samples.every=2", "trainer.max_steps=2")
    done = home.call(*(option for option in options if not option.startswith("callbacks.")))
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("bare"))
    assert run.metrics.exists() and not run.checkpoints() and not run.summary.exists()


class Broken(Monitor):
    """Takes figures, and fails at everything that only shows them."""

    name, version, checkpoints = "broken", "0", "all"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_facts(self, facts: Any) -> None: ...

    def log_picture(self, *args: Any) -> None:
        raise OSError("no server")

    def log_samples(self, *args: Any) -> None:
        raise OSError("no server")

    def log_best(self, *args: Any) -> None:
        raise OSError("no server")

    def log_checkpoint(self, *args: Any) -> None:
        raise OSError("no server")


@pytest.mark.slow
def test_no_report_fails_a_run(home) -> None:
    options = ["+logger.broken._target_=tests.training.test_callbacks.Broken", "trainer.max_steps=8"]
    done = home.call(*home.tiny("name=unshown", *options, plots=True))
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("unshown"))
    assert run.finished and "done: 8 steps" in done.stdout and done.stderr == ""
    for what in ("writing samples", "drawing pictures of the experts", "handing over the best figures",
                 "handing over the checkpoint step-8"):  # fmt: skip
        assert done.stdout.count(f"note: {what} failed, the run goes on without: ") == 1, what
    assert "OSError at test_callbacks.py" in done.stdout

    run.plots.rename(run.path / "moved")
    run.plots.write_text("in the way", "utf-8")
    done = home.call(f"resume={run.path}", "trainer.max_steps=9", *options[:1])
    assert done.returncode == 0, done.stderr
    assert "note: drawing the run's pictures failed" in done.stdout and run.read_summary()["steps"] == 9


def test_random_states_come_back_through_json_like_values() -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draws()
    state = json.loads(json.dumps(random_state()))
    first = draws()
    draws()
    set_random_state(state)
    assert draws() == first


def test_flops_of_a_dense_model_are_six_per_weight_plus_attention() -> None:
    config = ElaraConfig(ModelConfig(n_layer=3, n_embd=64, n_head=2, hidden=128, vocab_size=256, context_length=128))
    per_block = 64 * (3 * 64) + 64 * 64 + 3 * 64 * 128
    attention = 3 * 12 * 64 * 128 / 2
    assert flops_per_token(ElaraLM(config), 128) == 6 * (3 * per_block + 64 * 256) + attention


def test_flops_count_active_experts_every_pass_and_the_mask_section() -> None:
    sizes = ModelConfig(n_layer=2, n_embd=64, n_head=2, hidden=128, vocab_size=256, context_length=128)
    dense = ElaraConfig(sizes)
    block = 64 * (3 * 64) + 64 * 64
    attention = 2 * 12 * 64 * 128 / 2
    full = ElaraConfig(sizes, MoEConfig(num_experts=8, top_k=2), TRMConfig(depth=3), TiDARConfig(4, 0.25))
    active = 2 * block + 3 * 64 * 128 + 8 * 64 + 3 * (3 * 64 * 128)  # dense MLP; router, two of eight experts, shared
    expected = 1.25 * 3 * (6 * active + attention) + 6 * 1.25 * 64 * 256
    assert flops_per_token(ElaraLM(full), 128) == pytest.approx(expected)
    assert flops_per_token(ElaraLM(full), 128) > 3 * flops_per_token(ElaraLM(dense), 128)
    deeper = 1.25 * 5 * (6 * active + attention) + 6 * 1.25 * 64 * 256
    assert flops_per_token(ElaraLM(full), 128, depth=5) == pytest.approx(deeper)
    chained = replace(full, tidar=replace(full.tidar, chain=True))  # an MLP of 2 n -> n -> n for every mask
    assert flops_per_token(ElaraLM(chained), 128) == pytest.approx(expected + 6 * 0.25 * 5 * 64 * 64)


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_progress_words() -> None:
    assert [clock(s) for s in (0, 42.4, 725, 3723)] == ["0:00", "0:42", "12:05", "1:02:03"]
    assert figures_line({}, "train") == ""
    assert figures_line({"train/loss": 1.5, "train/loss_ar": 1.5}, "train") == "train loss 1.500"
    line = figures_line({"val/loss": 2.0, "val/loss_ar": 1.5, "val/loss_diffusion": 1.0}, "val")
    assert line == "val loss 2.000 (ar 1.500, diffusion 1.000)"
