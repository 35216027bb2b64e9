"""Run folders: where they are, how they are found, who may write to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elara import runs
from elara.errors import ElaraError
from elara.runs import Run


def make_run(
    root: Path, name: str, time: str, *, finished: bool = False, began: bool = True, steps: tuple[int, ...] = (),
    saved: str | None = None,
) -> Run:  # fmt: skip
    run = Run(root / name / time)
    (run.path / ".hydra").mkdir(parents=True)
    if began:
        run.config.write_text("name: x\n", "utf-8")
    if finished:
        run.summary.write_text(json.dumps({"finished": True}), "utf-8")
    for step in steps:
        folder = run.path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", "utf-8")
        (folder / "meta.json").write_text(json.dumps({"saved": saved} if saved else {}), "utf-8")
    return run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELARA_HOME", str(tmp_path))
    return tmp_path / "outputs" / "train"


def test_project_root_is_elara_home_then_the_checkout_then_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELARA_HOME", str(tmp_path / "home"))
    assert runs.project_root() == tmp_path / "home"
    monkeypatch.delenv("ELARA_HOME")
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(runs, "CHECKOUT", tmp_path)
    assert runs.project_root() == tmp_path
    monkeypatch.setattr(runs, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert runs.project_root() == tmp_path


def test_auto_resumes_the_newest_run_of_that_name_that_began_and_is_not_finished(home: Path) -> None:
    make_run(home, "bee", "2026-01-01_00-00-00")
    wanted = make_run(home, "bee", "2026-01-02_00-00-00")
    make_run(home, "bee", "2026-01-03_00-00-00", finished=True)
    make_run(home, "bee", "2026-01-04_00-00-00", began=False)
    make_run(home, "wasp", "2026-01-05_00-00-00")
    assert runs.newest_unfinished("bee") == wanted


def test_nothing_to_resume_is_said_in_one_line(home: Path) -> None:
    assert runs.newest_unfinished("bee") is None
    make_run(home, "bee", "2026-01-01_00-00-00", finished=True)
    with pytest.raises(ElaraError, match="every run called 'bee' is finished"):
        runs.newest_unfinished("bee")


def test_a_half_written_summary_counts_as_unfinished(home: Path) -> None:
    run = make_run(home, "bee", "2026-01-01_00-00-00")
    run.summary.write_text('{"finished": tr', "utf-8")
    assert not run.finished


def test_checkpoints_are_ordered_by_step_and_leftovers_are_not_among_them(home: Path) -> None:
    run = make_run(home, "bee", "2026-01-01_00-00-00", steps=(90, 1000, 200))
    (run.path / "checkpoints" / ".step-2000-ab12").mkdir()
    assert [runs.step_of(path) for path in run.checkpoints()] == [1000, 200, 90]


def test_find_checkpoint_takes_a_checkpoint_a_run_a_name_or_the_newest_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_run(home, "bee", "2026-01-01_00-00-00", finished=True, steps=(10, 20))
    new = make_run(home, "wasp", "2026-01-02_00-00-00", steps=(5,))
    old.best.symlink_to("step-10")
    assert runs.find_checkpoint() == new.path / "checkpoints" / "step-5", "finished or not"
    assert runs.find_checkpoint("wasp") == new.path / "checkpoints" / "step-5"
    (home / "elsewhere" / "wasp").mkdir(parents=True)
    monkeypatch.chdir(home / "elsewhere")
    assert runs.find_checkpoint("wasp") == new.path / "checkpoints" / "step-5", "an empty folder does not hide a run"
    assert runs.find_checkpoint(old.path) == old.best
    assert runs.find_checkpoint(old.path / "checkpoints" / "step-20").name == "step-20"


def test_the_newest_run_is_the_one_whose_last_checkpoint_is_in_universal_time(home: Path) -> None:
    """Not the one whose folder is called, or was copied, last."""
    new = make_run(home, "bee", "2026-01-01_20-00-00", steps=(5,), saved="2026-01-01T20:30:00+00:00")  # in London
    make_run(home, "bee", "2026-01-02_04-00-00", finished=True, steps=(5,), saved="2026-01-01T19:30:00+00:00")  # Tokyo
    make_run(home, "bee", "2026-01-01_12-00-00", finished=True, steps=(5,), saved="2026-01-01T20:10:00+00:00")  # LA
    assert runs.find_checkpoint("bee") == runs.find_checkpoint() == new.path / "checkpoints" / "step-5"
    assert runs.newest_unfinished("bee") == new
    assert [run.path.name[11:13] for run in runs.find_runs("bee")] == ["20", "12", "04"]


def test_a_checkpoint_without_a_time_of_its_own_has_its_files(home: Path) -> None:
    old = make_run(home, "bee", "2026-01-02_00-00-00", steps=(5,))
    os.utime(old.path / "checkpoints" / "step-5" / "meta.json", (10**9, 10**9))
    new = make_run(home, "bee", "2026-01-01_00-00-00", steps=(5,), saved="2026-01-01T00:30:00+00:00")
    assert runs.saved_at(old.path / "checkpoints" / "step-5") == 10**9
    assert runs.find_runs("bee") == [new, old]


def test_commands_name_the_python_that_runs_them(tmp_path: Path) -> None:
    """By its name where typing it finds it, as in an environment that is activated; else by its path."""
    ours, other = tmp_path / "my env" / "bin", tmp_path / "bin"
    for folder in (ours, other):
        folder.mkdir(parents=True)
        (folder / "python").symlink_to(sys.executable)
    packages = os.pathsep.join([str(Path(runs.__file__).parents[1]), *sys.path])
    for path, expected in (
        (f"{ours}:{other}", "python"), (f"{other}:{ours}", "'my env/bin/python'"), ("", "'my env/bin/python'")
    ):  # fmt: skip
        command = [str(ours / "python"), "-c", "from elara.runs import python; print(python())"]
        env = {**os.environ, "PATH": path, "PYTHONPATH": packages}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("where", [None, "hornet"])
def test_a_missing_checkpoint_says_what_to_do(home: Path, where: str | None) -> None:
    with pytest.raises(ElaraError, match=r"train one with `.* -m elara\.train` first"):
        runs.find_checkpoint(where)


HOLD = """
import sys
from pathlib import Path
from elara.runs import claim
lock = claim(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ElaraError, match="another process is training in"):
        runs.claim(tmp_path)
    other.kill()
    other.wait()
    runs.claim(tmp_path).close()


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file, not a folder", "utf-8")
    with pytest.raises(ElaraError, match="cannot write to"):
        runs.claim(tmp_path / "outputs" / "train" / "bee")
