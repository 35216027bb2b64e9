"""A search from its configuration to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elara.errors import ElaraError, Interrupted
from elara.sweep.compose import Steps
from elara.sweep.config import SearchConfig
from elara.sweep.report import write
from elara.sweep.search import INTERRUPTED, TIME_IS_UP, Search, say
from elara.sweep.space import Parameter
from elara.sweep.study import SharedStudy


def run(wanted: SearchConfig, space: Sequence[Parameter], fixed: Sequence[str], steps: Steps, folder: Path) -> None:
    """Search in `folder`, write the report, and tell the user; raises ElaraError when the trials do not work."""
    study = SharedStudy(wanted, space, fixed, folder, steps)
    announce(wanted, space, steps, study, folder)
    search = Search(wanted, fixed, study, folder)
    search.run()
    with study.alone("report", grace=300):  # read inside, so that the last one to write knows most
        records = study.records()
        told = write(records, wanted, space, fixed, folder) if records else []
    for line in ["", *told]:
        say(line)
    ended = sum(record.state in ("complete", "pruned") for record in records)
    if search.stopping == INTERRUPTED:
        raise Interrupted(f"interrupted at {ended} of {wanted.trials} trials: the same command goes on", saved=True)
    if search.stopping == TIME_IS_UP:
        say(f"the time is up at {ended} of {wanted.trials} trials: the same command goes on")
    elif search.stopping is not None:
        raise ElaraError(search.stopping)
    for record in study.elsewhere():
        say(f"trial {record.number} is still running on {record.host}; if that machine is dead: dead=[{record.host}]")


def announce(wanted: SearchConfig, space: Sequence[Parameter], steps: Steps, study: SharedStudy, folder: Path) -> None:
    """What is about to happen, and what was there before."""
    pruner = "no pruning" if wanted.pruner.name == "none" else f"{wanted.pruner.name} pruner"
    keys = ", ".join(parameter.key for parameter in space)
    say(f"search {wanted.study}: {keys}")
    say(f"{wanted.trials} trials, {wanted.jobs} at once, {wanted.sampler.name} sampler, {pruner}")
    say(f"folder {folder}")
    for note in notes(wanted, steps):
        say(f"note: {note}")
    before = [record for record in study.records() if record.state in ("complete", "pruned")]
    if before:
        say(f"going on: {len(before)} trials are there already")
    if study.revived:
        numbers = ", ".join(map(str, study.revived))
        say(f"run again, as their search was killed: {numbers}")


def notes(wanted: SearchConfig, steps: Steps) -> list[str]:
    """What about the pruning will probably disappoint."""
    if wanted.pruner.name == "none":
        return []
    if steps.looks == 0:
        return ["trials are validated at their end only, so none can be pruned: lower trainer.val_check_interval"]
    first, rising = steps.first_look(wanted.pruner.warmup), steps.rising
    if first is not None and rising is not None and first <= rising:
        what = f"trials may be pruned from step {first} on, but their rate rises until step {rising}, and until then"
        return [f"{what} a high rate looks better than it is: set pruner.warmup={rising + 1}"]
    return []
