"""Real runs, alone and as the jobs of a sweep, and folders of made-up figures where only arithmetic is asked about."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from elara.runs import Run
from elara.training.loggers import CSV
from tests import conftest
from tests.conftest import Home
from tests.forks import Done

SHORT = {"trainer.max_steps": 6, "trainer.val_check_interval": 3, "model.dropout": 0}
TINY = [text for text in conftest.TINY if text.partition("=")[0] not in SHORT]
TINY += [f"{key}={value}" for key, value in SHORT.items()]


def train_in(home: Path, *overrides: str) -> Done:
    """`elara.train` in this process."""
    return Home(home, home / "bees.txt").call(*overrides)


def write_job(run: Run, overrides: Sequence[str], code: int, error: str | None = None, log: str = "") -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    ended = {"exit_code": code, "error": error, "seconds": 1.5, "overrides": list(overrides)}
    run.job.write_text(json.dumps(ended), "utf-8")
    run.job_log.write_text(log, "utf-8")


def plan(folder: Path, *overrides: str) -> None:
    """What Hydra writes at the start of a multirun, as far as it matters."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"hydra": {"overrides": {"hydra": ["hydra.mode=MULTIRUN"], "task": list(overrides)}}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump(saved), "utf-8")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project root with a text to train on, which tries to be HTML."""
    path = tmp_path_factory.mktemp("report-home")
    words = ["the", "bee", "<b>flew</b>", "over", "honey", "&amp;", "<script>alert(1)</script>", "and", "slept"]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=7)) for _ in range(400)]
    (path / "bees.txt").write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture(scope="session")
def run(home: Path) -> Run:
    """A finished run with everything switched on."""
    done = train_in(home, *TINY, f"data.path={home / 'bees.txt'}", "name=bees")
    assert done.returncode == 0, done.stderr
    (folder,) = (home / "outputs" / "train" / "bees").glob("*/")
    return Run(folder)


@pytest.fixture(scope="session")
def sweep(home: Path) -> Path:
    """Two settings with two seeds each that train, one that cannot, and a job that was never started."""
    folder = home / "outputs" / "sweeps" / "toggles" / "2030-01-01_00-00-00"
    fixed = [*TINY, f"data.path='{home / 'bees.txt'}'", "name=toggles", "~callbacks.plots"]
    plan(folder, *fixed, "moe=none,deepseek,other", "seed=1,2")
    jobs = [[*fixed, f"moe={moe}", f"seed={seed}"] for moe in ("none", "deepseek", "other") for seed in (1, 2)]
    for number, overrides in enumerate(jobs[:5]):
        run = Run(folder / str(number))
        done = train_in(home, *overrides, f"hydra.run.dir='{run.path}'")
        assert (done.returncode == 0) is (number < 4), done.stderr
        error = done.stderr.removeprefix("error: ").strip() or None
        write_job(run, overrides, done.returncode, error, done.stdout + done.stderr)
    return folder


@pytest.fixture
def made_up(tmp_path: Path) -> Callable[..., Path]:
    """A sweep folder whose jobs have the given overrides and final losses; a loss of nan is a job that failed."""

    def make(jobs: Sequence[tuple[Sequence[str], float]], name: str = "made") -> Path:
        folder = tmp_path / name / "up"
        for number, (overrides, loss) in enumerate(jobs):
            run = Run(folder / str(number))
            failed = math.isnan(loss)
            write_job(run, overrides, int(failed), "cannot | go on\nat all" if failed else None)
            if failed:
                continue
            logger = CSV(str(run.metrics))
            for step in (10, 20, 30):
                logger.log_metrics({"train/loss_ar": loss + 30 / step, "val/loss_ar": loss + 10 / step - 1 / 3}, step)
            figures = {"finished": True, "steps": 30, "metrics": {}, "wall_seconds": 75, "parameters": 12_345}
            run.summary.write_text(json.dumps(figures), "utf-8")
        return folder

    return make
