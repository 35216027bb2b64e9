"""make and the environment in .venv: what it did not make, it uses or refuses, and never deletes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the rule of .venv reads, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make; what it would tell pip is shown instead of done."""
    command = ["make", "-C", str(tree), "PIP=echo pip", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""}, timeout=120)


def foreign(tree: Path) -> Path:
    """A working environment that make knows nothing of; pip comes from outside of it, which spares seconds."""
    options = ["--without-pip", "--system-site-packages"]
    subprocess.run([sys.executable, "-m", "venv", *options, str(tree / ".venv")], check=True)
    (site,) = (tree / ".venv").glob("lib/python*/site-packages")
    (site / "pip.py").write_text("")
    mine = tree / ".venv" / "mine.txt"
    mine.write_text("of the user")
    return mine


def break_it(tree: Path) -> None:
    (tree / ".venv" / "bin" / "python").unlink()
    os.utime(tree / ".venv" / ".core", (0, 0))  # older than pyproject.toml: make looks at it again


@pytest.mark.parametrize("stamp", [None, "/home/other/elara"])
def test_a_working_environment_of_somebody_else_is_used(tree, stamp):
    mine = foreign(tree)
    if stamp is not None:  # of a checkout that was copied
        (tree / ".venv" / ".core").write_text(stamp)
    done = make(tree, ".venv/.core")
    assert done.returncode == 0, done.stderr
    assert mine.read_text() == "of the user"
    assert "Making .venv" not in done.stdout and "pip -e ." in done.stdout
    assert (tree / ".venv" / ".core").read_text().strip() == str(tree)
    assert make(tree, "distclean").returncode == 0
    assert mine.exists()


@pytest.mark.parametrize("kind", ["folder", "old", "link", "broken later"])
def test_one_that_does_not_work_stops_make_and_stays(tree, kind):
    place = tree / ".venv"
    if kind == "link":
        place.symlink_to(tree / "gone")
    elif kind == "broken later":
        foreign(tree)
        assert make(tree, ".venv/.core").returncode == 0
        break_it(tree)
    else:
        (place / "bin").mkdir(parents=True)
        (place / "mine.txt").write_text("of the user")
        if kind == "old":
            (place / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
            (place / "bin" / "python").chmod(0o755)
    done = make(tree, ".venv/.core")
    assert done.returncode != 0
    assert "error: .venv was not made by make" in done.stderr
    assert place.is_symlink() or (place / "mine.txt").read_text() == "of the user"


@pytest.mark.slow
def test_its_own_is_made_and_made_anew_when_it_broke(tree):
    for _ in range(2):
        done = make(tree, ".venv/.core")
        assert done.returncode == 0, done.stderr
        assert "Making .venv" in done.stdout
        break_it(tree)
    assert make(tree, "distclean").returncode == 0
    assert not (tree / ".venv").exists()
