"""Measure speed as ratios: `python -m elara.bench [cases=[moe_layer]] [rounds=9]` prints a table and draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from elara.cli import hydra_main
from elara.training import config as training_config


@dataclass
class BenchConfig:
    """The schema of `conf/bench.yaml`."""

    cases: list[str] = field(default_factory=list)
    rounds: int = 5
    device: str = "auto"
    threads: int | None = None
    checkpoint: str | None = None


def bench(config: DictConfig) -> None:
    """Run the chosen cases and write what came out."""
    # torch takes a second to import: a typo should not wait for it
    from elara.bench.run import run

    folder = Path(HydraConfig.get().runtime.output_dir)
    run(list(config.cases), config.rounds, config.device, config.threads, config.checkpoint, folder)


def main() -> None:
    """Console script `elara-bench`."""
    training_config.register()
    ConfigStore.instance().store(name="bench_schema", node=BenchConfig)
    hydra_main("bench", bench)


if __name__ == "__main__":
    main()
