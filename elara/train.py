"""Train a model: `python -m elara.train [key=value ...]`; `--cfg job` prints the configuration, `--help` the groups."""

from __future__ import annotations

import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from elara import launch
from elara.cli import config_options, config_path, hydra_main, register_resolvers
from elara.overrides import quoted, without
from elara.sweep import multirun
from elara.training import resume
from elara.training.config import register


def train(config: DictConfig) -> None:
    """Run the training that `config` describes: here, in one process per device, or, in a sweep, in one per job."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        multirun.run_job(config.sweep.ray)
        return
    # torch and Lightning take seconds to import: a typo or `--cfg job` should not wait for them
    if not launch.is_rank() and config.trainer.get("strategy", "auto") != "auto":
        from elara.device import processes

        if (count := processes(config.trainer)) > 1:
            folder = str(hydra.runtime.output_dir)
            overrides = [*hydra.overrides.task, *without(hydra.overrides.hydra, "hydra.run", "hydra.mode")]
            place = [f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]
            command = [sys.executable, "-m", "elara.train", *config_options(), *overrides, *place]
            code = launch.run_ranks(command, count, f"python -m elara.train resume={folder}")
            raise SystemExit(code)
    from elara.training.run import run

    run(config)


def rewrite(arguments: list[str]) -> list[str]:
    """Let `resume=` and `sweep.resume=` take over the arguments of the run or sweep that goes on."""
    register_resolvers()
    return resume.rewrite(multirun.rewrite(arguments), config_path())


def main() -> None:
    """Console script `elara-train`."""
    register()
    hydra_main("train", train, rewrite)


if __name__ == "__main__":
    main()
