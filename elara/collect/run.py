"""One collection from beginning to end: prompts, teachers, filters, what came of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.utils import instantiate
from rich.console import Console

from elara import runs
from elara.backends import Backend
from elara.collect.asking import Asking, Teacher, share_of
from elara.collect.config import CollectConfig
from elara.collect.filters import Filters
from elara.collect.progress import Bars
from elara.collect.prompts import Prompts, read_prompts
from elara.collect.store import Store
from elara.collect.student import Student
from elara.collect.views import DISAGREEMENT, REJECTED, Kept, write_copy, write_disagreement, write_kept
from elara.data.samples import KEPT
from elara.device import find_device
from elara.errors import ElaraError, Interrupted


def store_folder(name: str) -> Path:
    return runs.project_root() / "data" / "collected" / name


def run(wanted: CollectConfig, *, chosen: bool) -> Path:
    """Ask what is not answered yet, then write the filtered view and say what came of it; returns the store's folder.

    chosen: whether a data set was named, whose passages are then asked about. Without teachers what the store holds is
    only filtered anew. Raises ElaraError, behind the summary, when a teacher failed or nothing was collected, and
    Interrupted when the user stops it: what was collected stays.
    """
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, soft_wrap=True)
    folder = store_folder(wanted.name)
    filters = _filters(wanted)  # a typo should not wait for the answers
    if not wanted.teachers and not (folder / "answers.jsonl").is_file():
        raise ElaraError(f"nobody is asked and {runs.shown(folder)} holds no answers: give teacher=[smollm2] or others")
    asked: list[Teacher] = []
    in_time = True
    with Store(folder) as store:
        if store.cut:
            console.print(f"the last line of {runs.shown(store.file)} was cut short by a kill; it is removed")
        if wanted.teachers:
            asked, in_time = _ask(wanted, store, chosen, console)
        if not len(store):
            for view in (KEPT, REJECTED, DISAGREEMENT):  # of answers that were thrown away
                (folder / view).unlink(missing_ok=True)
            raise ElaraError(_nothing(asked))
        kept = write_kept(store, filters, _weights(wanted))
        apart = write_disagreement(store)
        copy = write_copy(store) if wanted.store.parquet else None
        total = len(store)
    _summary(console, asked, kept, apart)
    files = [REJECTED] * bool(kept.rejected) + [DISAGREEMENT] * bool(apart) + ([copy.name] if copy is not None else [])
    console.print(f"store     {runs.shown(folder)}: {total:,} answers; {', '.join([KEPT, *files])}")
    if not in_time:
        console.print(f"time      minutes={wanted.minutes:g} are over; the same command goes on")
    if kept.kept:
        console.print(f"next      {runs.python()} -m elara.train data=chat data.path={runs.shown(folder / KEPT)}")
    else:
        console.print(f"next      see {runs.shown(folder / REJECTED)}: the filters kept nothing")
    if failed := [t for t in asked if t.dropped is not None or (t.failed and not t.answered + t.before)]:
        whys = [f"teacher {t.name} failed: {t.dropped or _listed(t.failed)}" for t in failed]
        raise ElaraError(f"{'; '.join(whys)}; what was answered is kept")
    return folder


def _ask(wanted: CollectConfig, store: Store, chosen: bool, console: Console) -> tuple[list[Teacher], bool]:
    """Returns the teachers, closed, and whether the time sufficed."""
    prompts = read_prompts(wanted.prompts, wanted.data if chosen else None, runs.project_root() / "data")
    weights = {name: teacher.weight for name, teacher in wanted.teachers.items()}
    teachers = []
    for name, teacher in wanted.teachers.items():
        part = prompts.prompts if wanted.ask == "all" else share_of(name, weights, prompts.prompts)
        backend: Backend = instantiate(teacher.backend)
        teachers.append(Teacher(name, backend, _weights(wanted)[name], part))
    console.print(f"prompts   {_described(prompts)}, each to {_receivers(wanted)}")
    with Bars(teachers) as bars:
        asking = Asking(store, teachers, wanted.sampling.params(), wanted.give_up, bars.say)
        try:
            in_time = asking.run(bars.tick, None if wanted.minutes is None else 60 * wanted.minutes)
        except KeyboardInterrupt:
            new = sum(teacher.answered for teacher in teachers)
            where = runs.shown(store.folder)
            raise Interrupted(
                f"interrupted; {new:,} new answers are in {where}: the same command goes on, teacher=[] filters them",
                saved=True,
            ) from None
        finally:
            asking.close()
    return teachers, in_time


def _filters(wanted: CollectConfig) -> Filters:
    name = wanted.filters.student
    return Filters(wanted.filters, None if name is None else Student(name, find_device(wanted.device)))


def _weights(wanted: CollectConfig) -> dict[str, float]:
    """Of the samples: where each prompt went to one teacher by weight, the weights have had their effect."""
    return {name: 1.0 if wanted.ask == "share" else teacher.weight for name, teacher in wanted.teachers.items()}


def _described(prompts: Prompts) -> str:
    number = len(prompts.prompts)
    parts = [f"{number:,}" if number == prompts.found else f"{number:,} of {prompts.found:,} (prompts.limit)"]
    if prompts.repeated:
        parts.append(f"{prompts.repeated:,} repeated")
    if prompts.unanswerable:
        parts.append(f"{prompts.unanswerable:,} without a question left out")
    return ", ".join(parts)


def _receivers(wanted: CollectConfig) -> str:
    names = list(wanted.teachers)
    if wanted.ask == "share" and len(names) > 1:
        return f"one of {', '.join(names)} by weight"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _summary(
    console: Console,
    asked: Sequence[Teacher],
    kept: Kept,
    apart: Mapping[tuple[str, str], tuple[float, int]],
) -> None:
    for teacher in asked:
        parts = [f"{teacher.answered:,} answered"]
        if teacher.before:
            parts.append(f"{teacher.before:,} were there")
        if teacher.failed:
            parts.append(f"{teacher.failed.total():,} failed ({_listed(teacher.failed)})")
        if teacher.dropped is not None:
            parts.append("dropped")
        if teacher.open:
            parts.append(f"{teacher.open:,} not asked")
        if teacher.answered and teacher.seconds > 0:
            parts.append(f"{teacher.characters / teacher.seconds:,.0f} characters/s")
            if teacher.tokens:
                parts.append(f"{teacher.tokens / teacher.seconds:,.1f} tokens/s")
        console.print(f"asked     {teacher.name}: {', '.join(parts)}")
    for name in sorted({*kept.kept, *kept.rejected}):
        rejected = kept.rejected.get(name, Counter())
        why = f", {rejected.total():,} rejected ({_listed(rejected)})" if rejected else ""
        console.print(f"filtered  {name}: {kept.kept[name]:,} kept{why}")
    for (a, b), (mean, number) in apart.items():
        console.print(f"apart     {a} and {b}: {mean:.2f} over {number:,} prompts (0 = equal, 1 = nothing in common)")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.most_common())


def _nothing(asked: Sequence[Teacher]) -> str:
    if not asked:
        return "the store holds no answers: give teacher=[smollm2] or others"
    whys = [f"{t.name}: {t.dropped or _listed(t.failed) or 'the time was too short'}" for t in asked]
    return f"nothing was collected; {'; '.join(whys)}"
