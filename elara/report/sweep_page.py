"""A sweep or search as a page: the table, the picture, what failed, and every run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from elara.report import page
from elara.report.comparison import Comparison
from elara.report.measures import label, measured, measured_of_groups, short_keys, tidy
from elara.report.outcome import Outcome, log_tail
from elara.report.run_page import alert
from elara.report.summary import DEFAULT, counts, runs_of
from elara.report.sweep_figure import panels


def sweep_page(comparison: Comparison, runs: Mapping[str, str], link: Callable[[Outcome], str]) -> str:
    """The whole page. runs: HTML of the runs that are shown on it, by job; link: address of a job's part or page."""
    parts = [
        page.heading(comparison.folder, comparison.title),
        page.state(counts(comparison).rstrip("."), "failed" if comparison.failed else "finished"),
        page.figures(_headline(comparison), "few"),
        page.log(log_tail(comparison.folder / "best.txt", 10)),  # of a search: the best trial's command
        _pictures(comparison),
        _seeds(comparison),
        "<h2>Every job</h2>",
        _jobs(comparison, link),
        _common(comparison),
        _runs("Not finished", comparison, comparison.failed, runs),
        _runs("Runs", comparison, [job for job in comparison.ranked if job not in comparison.failed], runs),
    ]
    return page.document(f"{comparison.title}: Elara", "\n".join(part for part in parts if part))


def _headline(comparison: Comparison) -> list[tuple[str, str]]:
    groups = [group for group in comparison.groups if group.loss]
    if not groups or groups[0].loss is None:
        return []
    best = groups[0].loss
    shown = f"{best.mean:.4f}" if math.isnan(best.deviation) else f"{best.mean:.4f} ± {best.deviation:.4f}"
    over = f" over {best.count} seeds" if best.count > 1 else ""
    cells = [(shown, f"best held-out loss{over}, nats per token: {label(comparison, groups[0])}")]
    if len(groups) > 1 and groups[1].loss:
        cells.append((f"+{groups[1].loss.mean - best.mean:.4f}", f"the next: {label(comparison, groups[1])}"))
    if len(groups) > 2 and groups[-1].loss:
        cells.append((f"+{groups[-1].loss.mean - best.mean:.4f}", f"the last: {label(comparison, groups[-1])}"))
    return cells


def _jobs(comparison: Comparison, link: Callable[[Outcome], str]) -> str:
    measures, names = measured(comparison), short_keys(comparison.keys)
    rows = []
    for job in comparison.ranked:
        name = f'<a href="{escape(link(job))}">{escape(job.name)}</a>'
        row = [page.Cell(name, job.name), *(_setting(job.overrides.get(key, "")) for key in comparison.keys)]
        row.append(page.Cell(page.state(job.state, job.state), job.state))
        row += [_figure(measure.value(job), measure.show(job)) for measure in measures]
        rows.append(row)
    head = ["job", *names.values(), "state", *(measure.title for measure in measures)]
    return page.sortable(head, rows, best=bool(comparison.finished) and not comparison.seeds)


def _seeds(comparison: Comparison) -> str:
    """Means over seeds."""
    if not comparison.seeds or not comparison.groups:
        return ""
    measures, names = measured_of_groups(comparison), short_keys(comparison.group_keys)
    rows = []
    for group in comparison.groups:
        row = [*map(_setting, group.values), page.Cell(runs_of(comparison, group), str(len(group.jobs)), True)]
        for measure in measures:
            spread = group.spread(measure.value)
            row.append(_figure(spread.mean if spread else None, measure.show_spread(spread)))
        rows.append(row)
    head = [*names.values(), "runs", *(measure.title for measure in measures)]
    return "<h2>Over seeds: mean ± sample standard deviation</h2>" + page.sortable(head, rows, best=True)


def _setting(value: str) -> page.Cell:
    return page.Cell(escape(tidy(value) or DEFAULT), value)


def _figure(value: float | None, shown: str) -> page.Cell:
    return page.Cell(escape(shown), "" if value is None else format(value, ".9g"), number=True)


def _pictures(comparison: Comparison) -> str:
    """The sweep's own, and what else a search has drawn."""
    shown = page.pictures([(panel, "Loss of the runs") for panel in panels(comparison)], "sweep")
    others = [path for path in sorted(comparison.folder.glob("*.png")) if path.name != "summary.png"]
    shown += "".join(f'<div class="panels">{page.image(path)}</div>' for path in others)
    return shown and f"<h2>Loss</h2>{shown}"


def _common(comparison: Comparison) -> str:
    return f"<h3>The same in all</h3>{page.chips(comparison.common.items())}" if comparison.common else ""


def _runs(title: str, comparison: Comparison, jobs: Sequence[Outcome], runs: Mapping[str, str]) -> str:
    """A folded part for each of `jobs`; of one that has a page of its own only what went wrong."""
    made = []
    for job in jobs:
        if (content := runs.get(job.name, alert(job))) == "":
            continue
        loss = "" if job.best_loss is None else f'<span class="loss">{job.best_loss:.4f}</span>'
        mark = "" if job.state == "finished" else f"{page.state(job.state, job.state)} "
        made.append(page.folded(f"{loss}{mark}{_name(comparison, job)}", content, kind="run", name=f"run-{job.name}"))
    return f"<h2>{title}</h2>{''.join(made)}" if made else ""


def _name(comparison: Comparison, job: Outcome) -> str:
    """A job's number and what sets it apart."""
    names = short_keys(comparison.keys)
    settings = " ".join(f"{names[key]}={tidy(job.overrides[key])}" for key in comparison.keys if key in job.overrides)
    return f"job {escape(job.name)} <code>{escape(settings)}</code>"
