"""What holds for every test, one thread per process and no setting left over; and a home for tiny runs."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors; before torch is imported, here and in child processes

from elara import runs, train
from elara.errors import ElaraError
from elara.export.llama_cpp import Library, find_library
from tests import forks
from tests.forks import Done

if TYPE_CHECKING:
    from elara.backends.smollm2 import SmolLM2  # imports PyTorch, which xdist's own process does not need

ROOT = Path(__file__).resolve().parents[1]
COUNTERPARTS = ROOT / ".counterparts"  # made by `make counterparts`
PYTHON = "python" if runs.python() == "python" else shlex.quote(sys.executable)  # as commands show it in another folder

TINY = [
    "data=text", "model.n_layer=2", "model.n_embd=32", "model.n_head=2", "model.hidden=64", "model.expert_hidden=32",
    "model.context_length=32", "model.dropout=0.1", "data.batch_size=4", "data.val_batches=2",
    "trainer.precision=32-true", "trainer.max_steps=24", "trainer.val_check_interval=8", "trainer.log_every_n_steps=1",
    "callbacks.samples.max_new_tokens=8", "callbacks.acceptance.prompts=2", "callbacks.acceptance.new_tokens=6",
]  # fmt: skip

TIMED = ("train/tokens_per_second", "train/seconds_per_step")


@dataclass
class Home:
    """A folder for data and outputs, with a text to train on."""

    path: Path
    text: Path

    def start(self, *overrides: str, module: str = "elara.train", **variables: str) -> forks.Forked:
        return forks.start(module, *overrides, cwd=self.path, env={**self.env(), **variables})

    def run(self, *overrides: str, module: str = "elara.train", **variables: str) -> Done:
        return forks.run(module, *overrides, cwd=self.path, env={**self.env(), **variables})

    def call(self, *overrides: str) -> Done:
        """The same inside this process: much faster, as torch is imported already."""
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with (
            pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        ):  # fmt: skip
            patch.setattr(sys, "argv", ["train.py", *overrides])
            patch.setenv("ELARA_HOME", str(self.path))
            patch.delenv("HYDRA_FULL_ERROR", raising=False)
            patch.chdir(self.path)
            try:
                train.main()
            except SystemExit as error:
                code = int(error.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    def env(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "WANDB_API_KEY")}
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {**inherited, "PYTHONPATH": paths, "ELARA_HOME": str(self.path), "OMP_NUM_THREADS": "1"}

    def tiny(self, *overrides: str, plots: bool = False) -> list[str]:
        """Overrides of a short training. plots: with pictures at its end, which take longer than all the rest."""
        others = any(override.startswith("callbacks=") for override in overrides)  # none of these groups draws
        undrawn = [] if plots or others else ["~callbacks.plots"]
        return [*TINY, f"data.path={self.text}", *undrawn, *overrides]

    @staticmethod
    def rows(run: Path) -> list[dict[str, str]]:
        """The whole rows of a run's metrics.csv, without what depends on the clock."""
        with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and None not in row.values()]
        return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]

    def only_run(self, name: str = "elara") -> Path:
        (found,) = (self.path / "outputs" / "train" / name).glob("*/")
        return found

    def kill_at(self, step: int, name: str, *overrides: str) -> Path:
        """Start a run and SIGKILL it once metrics.csv has a row of `step` or later; returns its folder."""
        process = self.start(*overrides, f"name={name}")
        run = self.wait_for(process, step, name)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return run

    def wait_for(self, process: forks.Forked, step: int, name: str) -> Path:
        """Wait until the run's metrics.csv has a row of `step` or later; returns its folder."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            for metrics in (self.path / "outputs" / "train" / name).glob("*/metrics.csv"):
                rows = self.rows(metrics.parent)
                if rows and int(rows[-1]["step"]) >= step:
                    return metrics.parent
            time.sleep(0.002)
        process.kill()
        raise AssertionError(f"the run did not reach step {step}: {process.communicate()}")


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents before their children, older ones first."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [found for child in children for found in (child, *descendants(child))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def traces(run: Path) -> dict[str, bytes]:
    """All files of a run but its lock."""
    files = [file for file in run.rglob("*") if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def make_text(characters: int, seed: int = 0) -> str:
    """Words with a little structure, so that there is something to learn."""
    generator = random.Random(seed)
    words = ["the", "bee", "queen", "flew", "over", "honey", "and", "found", "a", "flower", "drone", "sleeps"]
    text = ""
    while len(text) < characters:
        text += " ".join(generator.choices(words, k=generator.randint(3, 9))).capitalize() + ".\n"
    return text


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    thorough: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path.parent.name not in ("model", "decoding"):
            item.add_marker("no_cover")  # their own tests reach what is asked for; watching all takes twice as long
        if item.get_closest_marker("thorough"):
            thorough.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in thorough.values():
        for marker in cases[0].iter_markers("thorough"):
            count, others = marker.args
            kept = {round((i + 0.5) * len(cases) / count - 0.5) for i in range(count)}
            for i, item in enumerate(cases):
                if i not in kept:
                    item.add_marker(others)


@pytest.fixture(scope="session")
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("home")
    text = path / "bees.txt"
    text.write_text(make_text(12000), "utf-8")
    return Home(path, text)


@pytest.fixture
def home(session_home: Home) -> Home:
    return session_home


@pytest.fixture(scope="session")
def llama_library() -> Library:
    """llama.cpp's shared library, as `make counterparts` installs it; tests that need it are skipped without."""
    try:
        found = find_library(str(COUNTERPARTS) if COUNTERPARTS.is_dir() else None)
    except ElaraError as error:
        pytest.skip(str(error))
    if found is None:
        pytest.skip("llama.cpp's library is not here: `make counterparts` installs it")
    return found


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Call an entry point's `main` in this process, in a home of its own; returns exit code, stdout, stderr."""

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(main: Callable[[], None], home: Path, *arguments: str) -> tuple[int, str, str]:
        wanted = os.environ.get("HYDRA_FULL_ERROR", "0")
        monkeypatch.setenv("ELARA_HOME", str(home))
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["elara", *arguments])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            monkeypatch.setenv("HYDRA_FULL_ERROR", wanted)  # which `--cfg` leaves set
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(autouse=True)
def _one_line_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points that a test calls in this process switch Hydra's own error reports off through the environment."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2:
    """The real one, in float32; fetched and converted on the first run, kept under data/ for the next."""
    pytest.importorskip("transformers")
    from elara.backends.smollm2 import SmolLM2

    backend = SmolLM2(dtype="float32", cache=str(ROOT / "data" / "teachers"))
    try:
        backend.tokenizer()
    except ElaraError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    return backend
