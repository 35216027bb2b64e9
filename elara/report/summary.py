"""A sweep's answer: summary.md, summary.csv, summary.png in its folder, and a table on the terminal."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from elara.errors import never_fatal
from elara.report.comparison import Comparison, Group, compare
from elara.report.measures import MEASURES, measured, measured_of_groups, short_keys, tidy
from elara.report.outcome import Outcome, State
from elara.runs import write_whole

DISPENSABLE = ("at step", "last loss", "parameters", "wall time", "bits/char", "s/step")
DEFAULT = "-"  # in a cell: this run left the key at its default


def summarize(folder: Path) -> Comparison:
    """Read every job of a sweep or search and write summary.md, summary.csv and, if any is finished, summary.png.

    Raises ElaraError when the folder holds no jobs.
    """
    comparison = compare(folder)
    picture = folder / "summary.png"
    drawn = _draw(comparison, picture)
    if not drawn:
        picture.unlink(missing_ok=True)  # one from before would belong to other runs
    write_whole(folder / "summary.csv", _csv(comparison))
    write_whole(folder / "summary.md", markdown(comparison, picture.name if drawn else None))
    return comparison


def print_summary(comparison: Comparison) -> None:
    """The tables on the terminal, best first, what went wrong, and where the files lie."""
    console = Console(width=None if sys.stdout.isatty() else 1000)
    for title, rows in _sections(comparison):
        console.print(_fitting(title, rows, console))
    for job in comparison.failed:
        console.print(f"job {job.name}: {end_of(job)}", markup=False, highlight=False, soft_wrap=True)
    files = [path for end in ("md", "csv", "png") if (path := comparison.folder / f"summary.{end}").exists()]
    console.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def _fitting(title: str, rows: list[list[str]], console: Console) -> Table:
    """The table, on a narrow terminal without the columns that can be missed most."""
    table, unbound = _table(title, rows), console.options.update(max_width=10_000)
    for name in DISPENSABLE:
        if Measurement.get(console, unbound, table).maximum <= console.width:
            break
        kept = [i for i, column in enumerate(rows[0]) if column != name]
        rows = [[row[i] for i in kept] for row in rows]
        table = _table(title, rows)
    return table


def _table(title: str, rows: list[list[str]]) -> Table:
    head, *body = rows
    table = Table(title=title)
    for name, right in zip(head, _aligned_right(head, body), strict=True):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in body:
        table.add_row(*map(Text, row))  # not markup: a list of values has brackets
    return table


def markdown(comparison: Comparison, picture: str | None) -> str:
    """The summary as Markdown. picture: file name of the picture beside it."""
    lines = [f"# {comparison.title}", "", counts(comparison)]
    if comparison.common:
        lines += ["", f"The same in all: {', '.join(f'`{k}={v}`' for k, v in comparison.common.items())}."]
    if picture:
        lines += ["", f"![Held-out loss of every run]({picture})"]
    for title, rows in _sections(comparison):
        head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        marks = ["---:" if right else "---" for right in _aligned_right(head, body)]
        lines += ["", f"## {title}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (head, marks, *body)]
    if comparison.failed:
        lines += ["", "## Not finished", ""]
        lines += [f"* job {job.name}: {end_of(job)}" for job in comparison.failed]
    return "\n".join(lines) + "\n"


def end_of(job: Outcome) -> str:
    """How a job that is not finished ended, as `failed: out of memory`."""
    if job.state == "unfinished":
        return f"unfinished, at step {job.step:,}"
    return f"failed: {job.error}" if job.state == "failed" else job.state


def counts(comparison: Comparison) -> str:
    """`8 jobs: 7 finished, 1 failed.`"""
    states = [job.state for job in comparison.jobs]
    counted = [f"{states.count(state)} {state}" for state in get_args(State) if state in states]
    return f"{len(states)} {'job' if len(states) == 1 else 'jobs'}: {', '.join(counted)}."


def _sections(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows, heads first."""
    found = [("Every job", job_rows(comparison))]
    if comparison.seeds and comparison.groups:
        found.insert(0, ("Over seeds: mean ± sample standard deviation", group_rows(comparison)))
    return found


def group_rows(comparison: Comparison) -> list[list[str]]:
    """A head and a row for every group of seeds, best first."""
    measures, names = measured_of_groups(comparison), short_keys(comparison.group_keys)
    rows = [[*names.values(), "runs", *(measure.title for measure in measures)]]
    for group in comparison.groups:
        spreads = [measure.show_spread(group.spread(measure.value)) for measure in measures]
        rows.append([*(tidy(value) or DEFAULT for value in group.values), runs_of(comparison, group), *spreads])
    return rows


def runs_of(comparison: Comparison, group: Group) -> str:
    """How many of a group's runs came through: `3`, or `2 of 3`."""
    done, asked = len(group.jobs), comparison.asked(group)
    return str(done) if done == asked else f"{done} of {asked}"


def job_rows(comparison: Comparison) -> list[list[str]]:
    """A head and a row for every job, best first, those that are not finished at the end."""
    measures, names = measured(comparison), short_keys(comparison.keys)
    rows = [["job", *names.values(), "state", *(measure.title for measure in measures)]]
    for job in comparison.ranked:
        values = [tidy(job.overrides.get(key, "")) or DEFAULT for key in comparison.keys]
        rows.append([job.name, *values, job.state, *(measure.show(job) for measure in measures)])
    return rows


def _aligned_right(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers only."""
    cells = list(zip(*body, strict=True)) or [()] * len(head)
    return [bool(column) and all(not cell or cell[0].isdigit() for cell in column) for column in cells]


def _csv(comparison: Comparison) -> str:
    """Every job in its order, figures in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["job", *comparison.keys, "state", "error", *(measure.name for measure in MEASURES)])
    for job in comparison.jobs:
        values = [job.overrides.get(key, "") for key in comparison.keys]
        figures = [measure.value(job) for measure in MEASURES]
        plain = ["" if figure is None else format(figure, ".9g") for figure in figures]
        writer.writerow([job.name, *values, job.state, job.error or "", *plain])
    return out.getvalue()


def _draw(comparison: Comparison, path: Path) -> bool:
    from elara.report.sweep_figure import draw  # matplotlib takes a second to import: not before it is needed

    drawn = False
    with never_fatal(f"drawing {path.name}"):
        drawn = draw(comparison, path)
    return drawn
