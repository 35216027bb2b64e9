"""Which checkpoints, under which names, and the data that their runs were trained on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import cast

import yaml
from omegaconf import OmegaConf

from elara.data import DataConfig
from elara.errors import ElaraError
from elara.runs import Run, find_checkpoint


def find_models(wanted: object = None) -> dict[str, Path]:
    """Checkpoint folders by name: run and step, with the run's time where that is needed to tell two apart.

    wanted: a checkpoint folder, run folder or run name, or a list of them; None = the newest run. Raises ElaraError
    when one is not there or two are the same.
    """
    every = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    if not every:
        raise ElaraError("checkpoint=[] names nothing: give a checkpoint, a run or a list of them")
    found = [find_checkpoint(where if where is None else str(where)).resolve() for where in every]
    for i, folder in enumerate(found):
        if folder in found[:i]:
            raise ElaraError(f"checkpoint={every[i]} is {folder}, which was named before: give each once")
    for parts in (1, 2, 3):  # step; time before it; the whole path
        names = [_name(folder, parts) for folder in found]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, found, strict=True))


def run_of(folder: Path) -> Run | None:
    """The run that a checkpoint folder lies in; None when it was moved out of one."""
    run = Run(folder.resolve().parent.parent)
    return run if folder.resolve().parent.name == "checkpoints" and run.config.is_file() else None


def data_of(folder: Path) -> DataConfig | None:
    """The data that a checkpoint's run was trained on, from the run's config.yaml; None when that is not there."""
    run = run_of(folder)
    if run is None:
        return None
    try:
        config = yaml.safe_load(run.config.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ElaraError(f"{run.config} cannot be read: {str(error).splitlines()[0]}") from error
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict):
        return None
    if "${" in str(data):  # it would be worked out here, from what is on this machine
        raise ElaraError(f"{run.config} has a reference (${{...}}) in its data: a run writes none, do not trust it")
    known = {field.name for field in fields(DataConfig)}
    given = {str(key): value for key, value in data.items() if key in known}
    return cast(DataConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), given)))


def _name(folder: Path, parts: int) -> str:
    run = run_of(folder)
    if run is None or parts > 2:
        return str(folder) if parts > 2 else "/".join(folder.parts[-parts:])
    middle = f"{run.path.name}/" if parts == 2 else ""
    return f"{run.path.parent.name}/{middle}{folder.name}"
