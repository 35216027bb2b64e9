"""What a run is called where many are shown side by side: by what it was told to do differently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elara.errors import ElaraError
from elara.overrides import key_of, value_of, without
from elara.plan import is_sweep, read_plan
from elara.report.measures import short_keys, tidy
from elara.runs import Run

# how and where a run goes rather than what it computes
ASIDE = ("name", "resume", "logger", "callbacks", "trainer", "profiler", "launcher", "sweep", "search", "hydra")
LONGEST_NAME, LONGEST_TAG, LONGEST_VALUE = 128, 64, 32  # the first two are wandb's limits


def telling(folder: Path) -> list[str]:
    """The overrides of the run in `folder` that say what is special about it.

    In a sweep these are the ones that differ from job to job. Elsewhere: all, but those about logging, hardware and
    places in the file system.
    """
    overrides = Run(folder).read_overrides()
    if varied := _varied(folder.parent):
        return [text for text in overrides if key_of(text) in varied]
    return [text for text in without(overrides, *ASIDE) if "=" in text and not _is_place(text)]


def shown_name(name: str, overrides: Sequence[str]) -> str:
    """`elara moe=none lr=0.01`: keys by their last part, unless two would look alike."""
    short = short_keys([key_of(text) for text in overrides])
    return _cut(" ".join([name, *(f"{short[key_of(text)]}={_value(text)}" for text in overrides)]), LONGEST_NAME)


def tags(overrides: Sequence[str]) -> list[str]:
    """`moe=none`, `optimizer.lr=0.01`: one per override, with the whole key."""
    return [_cut(f"{key_of(text)}={_value(text)}", LONGEST_TAG) for text in overrides]


def kind(folder: Path) -> str:
    """train, sweep or search: what the run in `folder` is part of."""
    if is_sweep(folder.parent):
        return "sweep"
    return "search" if (folder.parent / "journal.log").exists() else "train"


def group(folder: Path) -> str | None:
    """The sweep `<name>/<time>` or the study that the run in `folder` belongs to; None for a run of its own."""
    whole = folder.parent
    return {"sweep": f"{whole.parent.name}/{whole.name}", "search": whole.name}.get(kind(folder))


def _varied(folder: Path) -> set[str]:
    """Keys that the sweep in `folder` gives several values."""
    try:
        return set(read_plan(folder).swept)
    except ElaraError:
        return set()  # no sweep, or a record that a name is not worth failing for


def _is_place(override: str) -> bool:
    return key_of(override).endswith("path") or "/" in value_of(override)


def _value(override: str) -> str:
    value = value_of(override)
    return _cut(tidy(value.rpartition("/")[2] or value), LONGEST_VALUE) or "null"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
