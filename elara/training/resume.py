"""`resume=` on the command line: turn it into the arguments of the run that is to go on.

Runs before Hydra and imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from elara import trust
from elara.configuration import compose
from elara.errors import ElaraError
from elara.launch import global_rank
from elara.overrides import is_override, key_of, quoted, value_of
from elara.runs import Run, find_runs, newest_unfinished

PLACE = ("resume", "hydra.run.dir")  # given anew here
NOT_INHERITED = (*PLACE, "data.changed")  # said of one command, not of the run
# keys whose value may be a relative path
PATHS = re.compile(
    r"data\.(replay\.)?(path|url)|tokenizer\.path|init_from|teachers\.\w+\.backend\.(checkpoint|model|cache|shards)"
)
RUNS = re.compile(r"init_from|.*\.checkpoint")  # of these, the keys whose value may be the name of a run instead


def rewrite(arguments: list[str]) -> list[str]:
    """Arguments that continue a run in its own folder; without `resume=` they are returned as they are.

    The run's saved overrides come back, those given now win; relative paths lead from the folder in which they were
    given. `auto` begins a run when there is none of that name yet.
    Raises ElaraError when the run is finished and no larger trainer.max_steps is given, there is no such folder, or it
    asks for what only its owner may ask for, unless `resume.trust=true` is given.
    """
    arguments, trusted = trust.taken(arguments)
    given = {key_of(text): text for text in arguments if is_override(text)}
    wanted = value_of(given["resume"]) if "resume" in given else ""
    if not wanted and trusted:
        raise ElaraError(f"{trust.TRUST}=true is about a folder to go on with: give resume=<run folder> too")
    if not wanted:
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ElaraError("resume continues one run: it does not go with --multirun")
    if wanted == "auto":
        others = [text for text in arguments if key_of(text) != "resume"]
        found = newest_unfinished(str(compose("train", others).name))
        if found is None:
            if global_rank() == 0:
                print("note: there is no run of this name to go on with: it begins now", file=sys.stderr)
            return [text for text in arguments if key_of(text) != "resume"]
        run = found
    else:
        run = _run_of(wanted)
    began_in = _began_in(run)
    saved = [_from(began_in, text) for text in _saved_overrides(run)]
    _refuse_finished(run, given)
    merged = [text for text in saved if key_of(text) not in given and key_of(text) not in NOT_INHERITED]
    if not trusted:
        trust.check(merged, given.values(), run.path)
    merged += [_from(Path.cwd(), text) for key, text in given.items() if key not in PLACE]
    if "trainer.precision" not in {key_of(text) for text in merged} and "trainer" not in given:
        merged += _saved_precision(run)
    options = [text for text in arguments if not is_override(text)]
    place = quoted(str(run.path))
    return [*options, *merged, f"resume={place}", f"hydra.run.dir={place}"]


def _run_of(wanted: str) -> Run:
    """The run of a folder, or, where there is no such folder, the newest one of that name."""
    folder = Path(wanted).expanduser()
    if not folder.exists() and re.fullmatch(r"[\w.-]+", wanted) and (runs := find_runs(wanted)):
        return runs[0]
    return Run(folder.resolve())


def _saved_overrides(run: Run) -> list[str]:
    try:
        saved = yaml.safe_load(run.overrides.read_text("utf-8")) or []
        if not isinstance(saved, list):
            raise ValueError("no list")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ElaraError(f"resume={run.path} is not a run folder: {run.overrides} cannot be read") from error
    return [str(text) for text in saved]


def _began_in(run: Run) -> Path | None:
    """The folder in which a run was begun, or last gone on with; None where its record does not say."""
    try:
        return Path(yaml.safe_load(run.hydra.read_text("utf-8"))["hydra"]["runtime"]["cwd"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None


def absolute(settings: Any, folder: Path, key: str = "") -> Any:
    """Nested settings whose paths lead from `folder`, wherever they are read. key: the dotted key of `settings`."""
    if isinstance(settings, dict):
        return {name: absolute(value, folder, f"{key}.{name}".lstrip(".")) for name, value in settings.items()}
    if not isinstance(settings, str) or not settings or not PATHS.fullmatch(key):
        return settings
    place = folder / settings
    there = any((place / part).exists() for part in ("config.json", "checkpoints")) or not RUNS.fullmatch(key)
    return os.path.abspath(place) if there and place.exists() else settings


def _from(folder: Path | None, override: str) -> str:
    """The same for an override."""
    key, value = key_of(override), value_of(override)
    found = value if folder is None else absolute(value, folder, key)
    if found == value:
        return override
    sign = "+" * (len(override) - len(override.lstrip("+")))
    return f"{sign}{key}={quoted(found)}"


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
        precision = (config or {}).get("trainer", {}).get("precision")
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return []  # killed before the configuration was written: nothing was computed yet
    return [f"trainer.precision={precision}"] if re.fullmatch(r"[\w-]+", str(precision or "")) else []
