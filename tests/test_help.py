"""`--help` tells what each command does, by examples that work, and every key that it has, with its comment."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from elara import help as helping
from elara.configuration import leaves
from elara.runs import python
from tests import forks

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "elara.train": "train", "elara.sample": "sample", "elara.verify": "verify", "elara.evaluate": "evaluate",
    "elara.export": "export", "elara.collect": "collect", "elara.data": "prepare", "elara.bench": "bench",
    "elara.sweep": "sweep",
}  # fmt: skip


def run(module: str, *arguments: str, cwd: Path, **variables: str) -> forks.Done:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ELARA_HOME": str(cwd), "COLUMNS": "100", **variables}
    return forks.run(module, *arguments, cwd=cwd, env=env)


def examples(module: str) -> list[str]:
    text = (ROOT / "conf" / f"{COMMANDS[module]}.yaml").read_text("utf-8")
    return [line.strip() for line in helping.head(text) if f" -m {module} " in line]


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize("module", COMMANDS)
def test_it_lists_every_key_and_explains_those_of_the_command(module: str, tmp_path: Path) -> None:
    done = run(module, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert re.fullmatch(r"[A-Z].*[.,:].*", first)
    assert all(len(line) <= 100 for line in lines if line.startswith(" " * helping.COLUMN))
    listed = [line.split("=")[0].strip() for line in lines if re.match(r"  [a-z][\w.]*=", line)]
    composed = yaml.safe_load(run(module, "--cfg", "job", cwd=tmp_path).stdout)
    keys = [key for key, _ in leaves(composed)]
    groups = [line for line in listed if line not in keys]
    assert sorted(listed) == sorted([*keys, *groups]) and len(set(listed)) == len(listed)
    folders = {folder.name for folder in (ROOT / "conf").glob("*/")}
    assert set(groups) <= folders
    bare = [line.strip() for line, below in zip(lines, [*lines[1:], ""], strict=True)
            if re.fullmatch(r"  [a-z][\w.]*=\S*", line) and not below.startswith(" " * helping.COLUMN)]  # fmt: skip
    own = yaml.safe_load((ROOT / "conf" / f"{COMMANDS[module]}.yaml").read_text("utf-8"))
    assert not [line for line in bare if line.partition("=")[0].partition(".")[0] in own.keys() - {"sweep"}]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", COMMANDS)
def test_there_are_three_examples(module: str) -> None:
    assert len(examples(module)) >= 3
    assert all(line.startswith(f"{python()} -m ") for line in examples(module))


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize(
    "example", [line for module in COMMANDS for line in examples(module) if line.count(" -m ") == 1]
)
def test_the_examples_compose(example: str, tmp_path: Path) -> None:
    _, _, module, *arguments = shlex.split(example, comments=True)
    done = run(module, "--cfg", "job", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_chosen_is_shown(tmp_path: Path) -> None:
    """The values of an option and of a recipe, and what stands beside them there."""
    done = run("elara.train", "experiment=plain_char", "optimizer=adamw", "--help", cwd=tmp_path)
    assert re.search(r"^  model.n_head=4 +query heads of 32$", done.stdout, re.MULTILINE)
    assert "  optimizer=adamw " in done.stdout and "optimizer.adam_lr" not in done.stdout


def test_nobody_has_to_read_all_of_it(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m elara.train --help | head -1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("elara.train", ["--max_steps", "3"], "there is no option --max_steps: settings are given as key=value, as in "
         "trainer.max_steps=3; --help lists them"),
        ("elara.train", ["--batch-size=4"], "as in data.batch_size=4;"),
        ("elara.sample", ["--temperature", "0.5"], "as in temperature=0.5;"),
        ("elara.train", ["--nothing-like-it"], "as in nothing_like_it=...;"),
        ("elara.train", ["max_steps=3"], "unknown key 'max_steps' (did you mean 'trainer.max_steps'?)"),
        ("elara.train", ["lr=3"], "unknown key 'lr' (did you mean 'optimizer.lr'?)"),
        ("elara.sweep", ["model=elara_tiny"], "model=elara_tiny is for the trials: write it behind --"),
        ("elara.sweep", ["trainer.max_steps=3", "--", "moe=none"], "trainer.max_steps=3 is for the trials"),
    ],
)  # fmt: skip
def test_habits_from_elsewhere_get_the_key(module: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(module, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_options_of_hydra_stay_options(tmp_path: Path) -> None:
    done = run("elara.train", "--config-dir", str(tmp_path), "--cfg", "job", "--package", "trm", cwd=tmp_path)
    assert done.returncode == 0 and "depth: 2" in done.stdout


def test_a_folder_of_ones_own_is_known(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 77\n")
    done = run("elara.train", "--config-dir", str(tmp_path), "experiment=mine", "--help", cwd=tmp_path)
    assert done.returncode == 0 and re.search(r"^  seed=77 ", done.stdout, re.MULTILINE)
