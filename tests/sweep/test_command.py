"""What the user types: the options in conf/search, mistakes as one line, and nothing heavy before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from elara.sweep.__main__ import main
from elara.sweep.compose import Steps, compose
from elara.sweep.config import PrunerConfig, SearchConfig
from elara.sweep.overrides import merged
from elara.sweep.run import notes
from elara.sweep.space import read_space
from tests.conftest import ROOT

Call = Callable[..., tuple[int, str, str]]
OPTIONS = sorted(file.stem for file in (ROOT / "conf" / "search").glob("*.yaml"))
GRID = "+space.moe={type: choice, choices: [none, deepseek]}"


@pytest.fixture
def cli(in_process, tmp_path: Path) -> Call:
    """`elara.sweep` with some arguments; returns exit code, stdout, stderr."""
    return partial(in_process, main, tmp_path)


def configuration(cli: Call, *arguments: str) -> dict:
    code, out, err = cli("--cfg", "job", *arguments)
    assert (code, err) == (0, "")
    return yaml.safe_load(out)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_searches_what_elara_train_knows(cli: Call, option: str) -> None:
    config = configuration(cli, f"search={option}")
    assert config.keys() == vars(SearchConfig()).keys()
    space = read_space(config["space"])
    steps = compose(merged([f"callbacks={config['trial_callbacks']}"], config["base"]), space)
    assert steps.last is not None and steps.looks is not None and steps.looks >= 4
    assert config["pruner"]["warmup"] < steps.last
    wanted = SearchConfig(pruner=PrunerConfig(**config["pruner"]))
    assert notes(wanted, steps) == []
    assert config["sampler"]["startup"] < config["trials"]


def test_what_stands_behind_two_dashes_goes_to_the_trials(cli: Call) -> None:
    overrides = ["model=elara_tiny", "data.path=/it's here/a\\b", "name='two words'", "+x={a: [1,2]}"]
    for before in (["--cfg", "job"], ["trials=3", "--cfg", "job"], ["--cfg", "job", "trials=3", "jobs=2"]):
        code, out, _ = cli(*before, "--", *overrides)
        assert code == 0
        assert yaml.safe_load(out)["overrides"] == overrides
    code, _, err = cli("overrides=[a]", "--", "b")
    assert (code, err) == (1, "error: give the trials' overrides either behind -- or as overrides=[...]\n")


def test_ranges_can_be_changed_keys_added_and_removed_on_the_command_line(cli: Call) -> None:
    changes = [
        "space.optimizer.lr.low=0.01",
        "~space.optimizer.adam_lr",
        "+space.trm.depth={type: int, low: 1, high: 3}",
    ]
    config = configuration(cli, *changes)
    assert [(p.key, p.low, p.high) for p in read_space(config["space"])] == [
        ("optimizer.lr", 0.01, 0.1), ("trm.depth", 1, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pruner", "steps", "expected"),
    [
        (PrunerConfig("median", warmup=0), Steps(120, 20, 30), "from step 20 on"),
        (PrunerConfig("median", warmup=25), Steps(120, 20, 45), "from step 40 on"),
        (PrunerConfig("hyperband", warmup=30), Steps(120, 30, 30), "set pruner.warmup=31"),
        (PrunerConfig("median", warmup=31), Steps(120, 20, 30), None),
        (PrunerConfig("median", warmup=0), Steps(120, 20, None), None),
        (PrunerConfig("median", warmup=0), Steps(120, 120, 30), "none can be pruned"),
        (PrunerConfig("none", warmup=0), Steps(120, 120, 30), None),
    ],
)
def test_pruning_that_would_disappoint_is_noted(pruner: PrunerConfig, steps: Steps, expected: str | None) -> None:
    found = notes(SearchConfig(pruner=pruner), steps)
    assert (expected is None and found == []) or (len(found) == 1 and str(expected) in found[0])


WRONG = {
    ("search=foo",): ["there is no search=foo", "choices: cmaes, lr, moe, recipe"],
    ("trails=3",): ["unknown key 'trails' (did you mean 'trials'?)"],
    ("trials=0",): ["trials=0 must be at least 1"],
    ("trials=many",): ["trials", "many"],
    ("jobs=0",): ["jobs=0 must be at least 1"],
    ("timeout=-1",): ["timeout=-1 must be a positive number of minutes"],
    ("study=a/b",): ["study=a/b names a folder"],
    ("metric=val/los",): ["metric=val/los is no column of metrics.csv (did you mean 'val/loss'?)"],
    ("direction=down",): ["direction=down must be one of: minimize, maximize"],
    ("sampler.name=tbe",): ["sampler.name=tbe must be one of: tpe, cmaes, random"],
    ("sampler.name=grid",): ["a grid is `python -m elara.train -m key=1,2,3`"],
    ("pruner.name=hyper",): ["pruner.name=hyper must be one of: median, hyperband, none"],
    ("pruner.startup=0",): ["pruner.startup=0 must be at least 1"],
    ("space.optimizer.lr.low=0.2",): ["space.optimizer.lr: low=0.2 must be below high=0.1"],
    ("space.optimizer.lr.low=0",): ["space.optimizer.lr: log=true needs a positive low"],
    ("+space.optimizer.lrr={type: float, low: 0, high: 1}",): ["unknown key 'optimizer.lrr' (did you mean 'opt"],
    (GRID, "space.moe.choices=[none,mine,deepseek]"): ["there is no moe=mine", "choices: deepseek, none"],
    ("+space.model.n_layer={type: float, low: 1, high: 3}", "space.model.n_layer.low=1.5"): ["model.n_layer", "1.5"],
    ("--", "modle=elara_tiny"): ["'modle'", "did you mean 'model'?"],
    ("--", "optimizer.lr=0.1"): ["optimizer.lr=0.1 is fixed, but optimizer.lr is searched", "~space.optimizer.lr"],
    ("--", "hydra.run.dir=x"): ["hydra.run.dir=x is not for the trials of a search"],
    ("--", "resume=auto"): ["resume=auto is not for the trials of a search"],
    ("trial_callbacks=none",): ["a search needs the callback `metrics`", "trial_callbacks=search"],
    ("--", "~logger.csv"): ["a search reads metrics.csv", "logger=csv"],
}  # fmt: skip


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_a_mistake_is_one_line_that_names_it(cli: Call, arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = cli(*arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in WRONG[arguments]:
        assert part in err
    assert not list(tmp_path.glob("outputs/**/journal.log"))


def test_a_folder_that_cannot_be_written_is_named(cli: Call, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file where the folder should be", "utf-8")
    code, _, err = cli()
    assert code == 1 and err.count("\n") == 1
    assert "cannot write" in err and "outputs" in err


@pytest.mark.parametrize("package", ["optuna", "cmaes", "sklearn"])
def test_a_missing_package_is_named_with_the_way_to_get_it(
    cli: Call, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = cli()
    assert code == 1 and err.count("\n") == 1
    assert "pip install 'elara-hivemind[sweep]'" in err


def test_the_configuration_is_shown_without_heavy_imports(tmp_path: Path) -> None:
    program = (
        "import sys; from elara.sweep.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'optuna', 'matplotlib', 'sklearn'} & set(sys.modules), 'heavy import'"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ELARA_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, "search=recipe", "--cfg", "job"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "batch_size" in done.stdout
