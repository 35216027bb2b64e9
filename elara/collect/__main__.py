"""Collect what teachers answer: `python -m elara.collect prompts.path=questions.txt teacher=[smollm2,ollama]`."""

from __future__ import annotations

import os
import sys
import threading
from typing import cast

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from elara.cli import hydra_main
from elara.collect.config import THREAD, CollectConfig
from elara.errors import ElaraError


def collect(config: DictConfig) -> None:
    """Ask what the configuration says."""
    hydra = HydraConfig.get()
    chosen = hydra.runtime.choices.get("data") is not None
    for given in hydra.overrides.task:
        if given.startswith("tokenizer"):
            raise ElaraError(f"{given}: teachers have tokenizers of their own; leave this out")
    wanted = cast(CollectConfig, OmegaConf.to_object(config))
    from elara.collect.run import run  # torch takes a second to import: a typo should not wait for it

    run(wanted, chosen=chosen)


def main() -> None:
    """Console script `elara-collect`."""
    ConfigStore.instance().store(name="collect_schema", node=CollectConfig)
    code = 0
    try:
        hydra_main("collect", collect)
    except SystemExit as ending:
        code = int(ending.code or 0)
    if any(thread.name.startswith(THREAD) for thread in threading.enumerate()):
        # A model in memory that still writes cannot be stopped, and its C++ would abort at the interpreter's end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
