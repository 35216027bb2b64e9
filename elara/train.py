"""Train a model: `python -m elara.train [key=value ...]`; `--cfg job` prints the configuration, `--help` the groups."""

from __future__ import annotations

from omegaconf import DictConfig

from elara.cli import config_path, hydra_main, register_resolvers
from elara.training import resume
from elara.training.config import register


def train(config: DictConfig) -> None:
    """Run the training that `config` describes."""
    # torch and Lightning take seconds to import: a typo or `--cfg job` should not wait for them
    from elara.training.run import run

    run(config)


def rewrite(arguments: list[str]) -> list[str]:
    """Let `resume=` take over the arguments of the run that goes on."""
    register_resolvers()
    return resume.rewrite(arguments, config_path())


def main() -> None:
    """Console script `elara-train`."""
    register()
    hydra_main("train", train, rewrite)


if __name__ == "__main__":
    main()
