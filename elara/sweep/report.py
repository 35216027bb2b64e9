"""What a search found: the best command, tables as Markdown and CSV, pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from elara.errors import never_fatal
from elara.runs import python, write_whole
from elara.sweep.config import SearchConfig
from elara.sweep.importance import LEAST, Importance, importances
from elara.sweep.overrides import merged, train_command
from elara.sweep.records import Record, best, duration
from elara.sweep.space import Parameter


def write(
    records: Sequence[Record],
    wanted: SearchConfig,
    space: Sequence[Parameter],
    fixed: Sequence[str],
    folder: Path,
) -> list[str]:
    """Write summary.md, summary.csv, best.txt and the pictures into `folder`; returns what to tell the user."""
    from elara.sweep import figures  # matplotlib takes a second to import

    top = best(records, wanted.direction)
    shares = importances(records, space)
    told = [_counts(records, wanted)]
    if saved := saved_by_pruning(records):
        told.append(saved)
    if shares is None:
        told.append(f"importances need {LEAST} trials, so they are left out")
    if top is not None:
        command = best_command(top, fixed)
        write_whole(folder / "best.txt", f"# {wanted.metric} {top.value:.6g}, trial {top.number}\n{command}\n")
        here = best_command(top, fixed, python())
        told += [f"best: trial {top.number}, {wanted.metric} {top.value:.4f}", "", f"  {here}", ""]
    write_whole(folder / "summary.csv", _csv(records, wanted, space))
    pictures: dict[str, bytes] = {}
    with never_fatal("drawing the search's pictures"):
        pictures = figures.draw(records, wanted, space, shares)
    for name, picture in pictures.items():
        write_whole(folder / name, picture)
    write_whole(folder / "summary.md", _markdown(records, wanted, space, fixed, shares, list(pictures)))
    told += [f"written: {', '.join(str(folder / name) for name in ['summary.md', 'summary.csv', *pictures])}"]
    return told


def best_command(record: Record, fixed: Sequence[str], python: str = "python") -> str:
    """The shell command that trains a trial's settings, with the callbacks of an ordinary run."""
    return train_command(merged(fixed, record.overrides), python)


def saved_by_pruning(records: Sequence[Record]) -> str | None:
    """How much more time the pruned trials would have taken, had each trained as long as the complete ones did."""
    complete = [record.seconds for record in records if record.state == "complete"]
    pruned = [record.seconds for record in records if record.state == "pruned"]
    if not complete or not pruned:
        return None
    mean = sum(complete) / len(complete)
    saved = len(pruned) * mean - sum(pruned)
    whole = sum(complete) + len(pruned) * mean
    count = "one trial" if len(pruned) == 1 else f"{len(pruned)} trials"
    return f"pruning {count} saved about {duration(saved)} of {duration(whole)} ({saved / whole:.0%})"


def _counts(records: Sequence[Record], wanted: SearchConfig) -> str:
    words = {"complete": "trained to the end", "pruned": "pruned", "failed": "failed", "running": "running",
             "stopped": "stopped"}  # fmt: skip
    counts = {word: sum(record.state == state for record in records) for state, word in words.items()}
    parts = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{counts['trained to the end'] + counts['pruned']} of {wanted.trials} trials: {parts}"


def _ordered(records: Sequence[Record], wanted: SearchConfig) -> list[Record]:
    """The best first; then the pruned ones, those that came furthest first; then the rest."""
    order = ["complete", "pruned", "running", "stopped", "failed"]
    sign = 1 if wanted.direction == "minimize" else -1

    def key(record: Record) -> tuple[int, int, float, int]:
        reached = 0 if record.state == "complete" else -max(record.curve, default=0)
        return order.index(record.state), reached, sign * (record.value or 0.0), record.number

    return sorted(records, key=key)


def _cells(record: Record, space: Sequence[Parameter]) -> list[str]:
    return [p.text(record.values[p.key]) if p.key in record.values else "" for p in space]


def _csv(records: Sequence[Record], wanted: SearchConfig, space: Sequence[Parameter]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", wanted.metric, "step", "seconds", "host", *(p.key for p in space), "error"])
    for record in records:
        value = "" if record.value is None else format(record.value, ".9g")
        place = [record.number, record.state, value, max(record.curve, default=""), round(record.seconds, 1)]
        writer.writerow([*place, record.host, *_cells(record, space), record.error or ""])
    return out.getvalue()


def _markdown(
    records: Sequence[Record],
    wanted: SearchConfig,
    space: Sequence[Parameter],
    fixed: Sequence[str],
    shares: Sequence[Importance] | None,
    pictures: Sequence[str],
) -> str:
    lines = [f"# Search {wanted.study}", "", f"{wanted.direction} {wanted.metric}, {wanted.sampler.name} sampler, "
             f"pruner {wanted.pruner.name}. {_counts(records, wanted)}."]  # fmt: skip
    if top := best(records, wanted.direction):
        lines += ["", f"Best is trial {top.number} with {wanted.metric} {top.value:.4f}:", ""]
        lines += [f"    {best_command(top, fixed)}"]
    lines += ["", *_table(["trial", wanted.metric, "step", "state", *(p.key for p in space), "time"], [
        [str(r.number), "" if r.value is None else f"{r.value:.4f}", str(max(r.curve, default="")), r.state,
         *_cells(r, space), duration(r.seconds)]
        for r in _ordered(records, wanted)
    ])]  # fmt: skip
    if saved := saved_by_pruning(records):
        lines += ["", f"{saved[0].upper()}{saved[1:]}, had each trained as long as the complete ones did on average."]
    if failed := [record for record in records if record.state == "failed"]:
        lines += ["", "Failed:", "", *(f"- trial {record.number}: {record.error}" for record in failed)]
    if shares is None:
        lines += ["", f"Importances need {LEAST} trials, so they are left out."]
    else:
        rows = [[share.key, f"{share.share:.0%}", f"{share.low:.0%} to {share.high:.0%}"] for share in shares]
        lines += [
            "",
            f"Share of the spread of {wanted.metric} that each key explains alone (fANOVA), and the range of "
            "the middle 80 % of resampled trials; pruned ones as if they had gone on like the others:",
            "",
        ]
        lines += _table(["key", "share", "range"], rows)
    lines += [line for name in pictures for line in ("", f"![{name.removesuffix('.png')}]({name})")]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]
