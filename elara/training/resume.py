"""`resume=` on the command line: turn it into the arguments of the run that is to go on.

Runs before Hydra and imports neither torch nor Lightning.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from elara.errors import ElaraError
from elara.runs import Run, newest_unfinished

NOT_INHERITED = ("resume", "hydra.run.dir")


def rewrite(arguments: list[str], config_path: str) -> list[str]:
    """Arguments that continue a run in its own folder; without `resume=` they are returned as they are.

    The run's saved overrides come back, those given now win. Raises ElaraError when there is nothing to resume or the
    run is finished and no larger trainer.max_steps is given.
    """
    given = {key_of(text): text for text in arguments if is_override(text)}
    wanted = value_of(given["resume"]) if "resume" in given else ""
    if not wanted:
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ElaraError("resume continues one run: it does not go with --multirun")
    if wanted == "auto":
        run = newest_unfinished(_name([text for key, text in given.items() if key != "resume"], config_path))
    else:
        run = Run(Path(wanted).expanduser().resolve())
    saved = _saved_overrides(run)
    _refuse_finished(run, given)
    merged = [text for text in saved if key_of(text) not in given and key_of(text) not in NOT_INHERITED]
    merged += [text for key, text in given.items() if key not in NOT_INHERITED]
    if "trainer.precision" not in {key_of(text) for text in merged} and "trainer" not in given:
        merged += _saved_precision(run)
    options = [text for text in arguments if not is_override(text)]
    place = quoted(str(run.path))
    return [*options, *merged, f"resume={place}", f"hydra.run.dir={place}"]


def is_override(argument: str) -> bool:
    """Whether a command line argument is a Hydra override rather than an option such as --cfg."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def key_of(override: str) -> str:
    """What an override is about: `trainer.max_steps` of `+trainer.max_steps=3`."""
    return override.lstrip("+~").partition("=")[0]


def value_of(override: str) -> str:
    """Its value as Hydra reads it, quotes undone, or as it stands where Hydra cannot; "" for null."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:  # a path with signs that the grammar wants quoted: what is meant is clear here
        return override.partition("=")[2]
    return "" if value is None else str(value)


def quoted(value: str) -> str:
    """A value that Hydra's grammar reads back unchanged."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _name(overrides: list[str], config_path: str) -> str:
    initialize: Any = (
        initialize_config_module(config_path.removeprefix("pkg://"), version_base="1.3")
        if config_path.startswith("pkg://")
        else initialize_config_dir(config_path, version_base="1.3")
    )
    with initialize:
        return str(compose("train", overrides=overrides).name)


def _saved_overrides(run: Run) -> list[str]:
    try:
        saved = yaml.safe_load(run.overrides.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ElaraError(f"resume={run.path} is not a run folder: {run.overrides} cannot be read") from error
    return [str(text) for text in saved or []]


def _refuse_finished(run: Run, given: dict[str, str]) -> None:
    if not run.finished:
        return
    steps = int(run.read_summary().get("steps", 0))
    asked = value_of(given["trainer.max_steps"]) if "trainer.max_steps" in given else ""
    if not re.fullmatch(r"\d+", asked) or int(asked) <= steps:
        raise ElaraError(f"{run.path} is finished at step {steps}: give a larger trainer.max_steps to train it on")


def _saved_precision(run: Run) -> list[str]:
    """What `auto` meant when the run began: another machine must not change the numbers behind its back."""
    try:
        config = yaml.safe_load(run.config.read_text("utf-8"))
    except (OSError, yaml.YAMLError):
        return []  # killed before the configuration was written: nothing was computed yet
    precision = (config or {}).get("trainer", {}).get("precision")
    return [f"trainer.precision={precision}"] if precision else []
