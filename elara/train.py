"""Train a model: `python -m elara.train [key=value ...]`; `--cfg job` prints the configuration, `--help` the groups."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from elara import launch
from elara.cli import check_effect, check_numbers, config_options, guard, hydra_main, register_resolvers
from elara.errors import ElaraError
from elara.overrides import is_override, quoted, without
from elara.runs import Run, python
from elara.sweep import multirun
from elara.training import resume
from elara.training.config import register

_given: list[str] = []  # overrides of this command line, without those of a run that goes on


def train(config: DictConfig) -> None:
    """Run the training that `config` describes: here, in one process per device, or, in a sweep, in one per job."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        check_effect(config)
        multirun.run_job(config.sweep.ray)
        return
    # torch and Lightning take seconds to import: a typo or `--cfg job` should not wait for them
    check_numbers(config)
    check_effect(config, _given)
    count = 1 if launch.is_rank() else _processes(config)
    if count > 1:
        _start_ranks(count, Run(Path(hydra.runtime.output_dir)))
    from elara.training.run import run

    run(config)


def _processes(config: DictConfig) -> int:
    """How many processes this machine is to train with, each on a device of its own."""
    if config.trainer.get("devices", 1) == 1:
        return 1
    from elara.device import processes

    return processes(config.trainer)


def _start_ranks(count: int, here: Run) -> NoReturn:
    """Train in `count` processes that do what this one was told, and end as they do."""
    hydra = HydraConfig.get()
    overrides = [*hydra.overrides.task, *without(hydra.overrides.hydra, "hydra.run", "hydra.mode")]
    place = f"hydra.run.dir={quoted(str(here.path))}"
    command = [sys.executable, "-m", "elara.train", *config_options(), *overrides, place]
    go_on = f"{python()} -m elara.train resume={shlex.quote(str(here.path))}"
    raise SystemExit(launch.run_ranks(command, count, go_on))


def rewrite(arguments: list[str]) -> list[str]:
    """Let `resume=` and `sweep.resume=` take over the arguments of the run or sweep that goes on."""
    _given[:] = [text for text in arguments if is_override(text)]
    register_resolvers()
    if launch.is_rank() and {"-m", "--multirun"} & set(arguments):
        raise ElaraError("a sweep (-m) starts its processes itself: run it without torchrun or srun")
    return resume.rewrite(multirun.rewrite(arguments))


def main() -> None:
    """Console script `elara-train`."""
    register()
    try:
        hydra_main("train", train, rewrite)
    finally:
        guard(multirun.end)


if __name__ == "__main__":
    main()
