"""Where the files of the configuration lie, and what they and a command line come to; nothing is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from elara import runs
from elara.overrides import is_override, quoted


def config_path() -> str:
    """Where Hydra finds it: the package `elara.conf`, or the checkout's folder when nothing is installed."""
    return "pkg://elara.conf" if importlib.util.find_spec("elara.conf") else str(runs.CHECKOUT / "conf")


def conf_folder() -> Path:
    """The folder of the same files."""
    package = importlib.util.find_spec("elara.conf")
    places = package.submodule_search_locations if package is not None else None
    return Path(next(iter(places))) if places else runs.CHECKOUT / "conf"


def compose(config_name: str, arguments: Sequence[str], *, whole: bool = False) -> DictConfig:
    """The configuration that a command line asks for. whole: with Hydra's own part."""
    place = config_path()
    initialized: Any = (
        hydra.initialize_config_module(place.removeprefix("pkg://"), version_base="1.3")
        if place.startswith("pkg://")
        else hydra.initialize_config_dir(place, version_base="1.3")
    )
    overrides = [text for text in arguments if is_override(text)]
    with initialized:
        return hydra.compose(config_name, [*overrides, *_search_path(arguments)], return_hydra_config=whole)


def leaves(config: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, as `trainer.max_steps`, with its value as it was written; none of Hydra's own."""
    settings: Any = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from () if f"{above}{key}" == "hydra" else leaves(value, f"{above}{key}.")
        elif key not in ("_target_", "_partial_"):
            yield f"{above}{key}", value


def places(config: Any, name: str) -> list[str]:
    """The full keys that end in `name`: `trainer.max_steps` for `max_steps`."""
    return [key for key, _ in leaves(config) if key.endswith(f".{name}")]


def _search_path(arguments: Sequence[str]) -> list[str]:
    """The folder of --config-dir as an override that a composition understands."""
    for text, following in pairwise([*arguments, ""]):
        option, _, value = text.partition("=")
        if option in ("--config-dir", "-cd"):
            return [f"hydra.searchpath=[{quoted(f'file://{Path(value or following).resolve()}')}]"]
    return []
