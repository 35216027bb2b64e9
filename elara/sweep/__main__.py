"""Search for good settings: `python -m elara.sweep search=lr trials=30 -- model=elara_tiny`.

What stands behind `--` goes to every trial, each of which is one `python -m elara.train`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import cast

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from elara.cli import hydra_main
from elara.configuration import conf_folder
from elara.errors import ElaraError
from elara.overrides import is_override, key_of, quoted
from elara.sweep.compose import compose
from elara.sweep.config import SearchConfig, check
from elara.sweep.overrides import merged
from elara.sweep.space import read_space

PACKAGES = {"optuna": "optuna", "cmaes": "cmaes", "sklearn": "scikit-learn"}


def search(config: DictConfig) -> None:
    """Run the search that `config` describes, and say what came out."""
    wanted = cast(SearchConfig, OmegaConf.to_object(config))
    check(wanted)
    space = read_space(wanted.space)
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise ElaraError(f"a search needs the package {package}: pip install 'elara-hivemind[sweep]'")
    fixed = merged(wanted.base, wanted.overrides)
    steps = compose(merged(wanted.callbacks(), fixed), space)
    from elara.sweep.run import run  # behind the checks, which a search without Optuna or with a typo does not pass

    run(wanted, space, fixed, steps, Path(HydraConfig.get().runtime.output_dir))


def rewrite(arguments: list[str]) -> list[str]:
    """What stands behind `--` becomes the list `overrides`."""
    if {"-m", "--multirun"} & set(arguments):
        raise ElaraError("a search runs many trainings already: leave out -m")
    if "--" not in arguments:
        check_own(arguments)
        return arguments
    place = arguments.index("--")
    own, trials = arguments[:place], arguments[place + 1 :]
    check_own(own)
    if any(key_of(argument) == "overrides" for argument in own):
        raise ElaraError("give the trials' overrides either behind -- or as overrides=[...]")
    # beside the other overrides: argparse takes no options between them
    place = max((i + 1 for i, argument in enumerate(own) if is_override(argument)), default=0)
    return [*own[:place], f"overrides=[{','.join(map(quoted, trials))}]", *own[place:]]


def check_own(arguments: list[str]) -> None:
    """Raise ElaraError for a setting of `elara.train` among those of the search."""
    own = {"search", "hydra", *(field.name for field in fields(SearchConfig))}
    groups = {folder.name for folder in conf_folder().glob("*/")}
    trials = groups | yaml.safe_load((conf_folder() / "train.yaml").read_text("utf-8")).keys()
    for argument in filter(is_override, arguments):
        if key_of(argument).partition(".")[0] in trials - own:
            raise ElaraError(f"{argument} is for the trials: write it behind --, as in `elara.sweep -- {argument}`")


def main() -> None:
    """Console script `elara-sweep`."""
    ConfigStore.instance().store(name="sweep_schema", node=SearchConfig)
    hydra_main("sweep", search, rewrite)


if __name__ == "__main__":
    main()
