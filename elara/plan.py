"""The plan of a sweep: what `elara.train -m` was asked for, and the jobs that come of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from elara.errors import ElaraError
from elara.overrides import key_of

MULTIRUN = "multirun.yaml"  # Hydra's own record of a sweep, in its folder


@dataclass
class Plan:
    """The jobs of a sweep: their overrides in Hydra's order, and the keys that differ between them.

    task, hydra: what the command line said, about the runs and about Hydra itself.
    """

    jobs: list[list[str]]
    swept: list[str]
    task: list[str]
    hydra: list[str]

    def label(self, number: int) -> str:
        """What sets a job apart, as `moe=none trm=depth2`."""
        return " ".join(text for text in self.jobs[number] if key_of(text) in self.swept) or "the only job"


def is_sweep(folder: Path) -> bool:
    """Whether Hydra made this folder for a sweep."""
    return (folder / MULTIRUN).is_file()


def read_plan(folder: Path) -> Plan:
    """The plan of a sweep folder; raises ElaraError when it is none."""
    try:
        overrides = yaml.safe_load((folder / MULTIRUN).read_text("utf-8"))["hydra"]["overrides"]
        task, hydra = ([str(text) for text in overrides[part]] for part in ("task", "hydra"))
        parsed = OverridesParser.create().parse_overrides(task)
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, HydraException) as error:
        raise ElaraError(f"{folder} is not a sweep folder: {MULTIRUN} cannot be read") from error
    return Plan([list(job) for job in jobs], [o.key_or_group for o in parsed if o.is_sweep_override()], task, hydra)
