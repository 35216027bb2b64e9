"""Collect what teachers answer: `python -m elara.collect prompts.path=questions.txt teacher=[smollm2,ollama]`."""

from __future__ import annotations

from typing import cast

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from elara.cli import hydra_main
from elara.collect.config import CollectConfig
from elara.errors import ElaraError


def collect(config: DictConfig) -> None:
    """Ask what the configuration says."""
    hydra = HydraConfig.get()
    chosen = hydra.runtime.choices.get("data") is not None
    for given in hydra.overrides.task:
        if given.startswith("tokenizer"):
            raise ElaraError(f"{given}: teachers have tokenizers of their own; leave this out")
        if given.startswith("data.") and not chosen:
            raise ElaraError(f"{given} needs the data group it belongs to: give data=text or another one as well")
    wanted = cast(CollectConfig, OmegaConf.to_object(config))
    from elara.collect.run import run  # torch takes a second to import: a typo should not wait for it

    run(wanted, chosen=chosen)


def main() -> None:
    """Console script `elara-collect`."""
    ConfigStore.instance().store(name="collect_schema", node=CollectConfig)
    hydra_main("collect", collect)


if __name__ == "__main__":
    main()
