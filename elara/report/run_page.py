"""A run as a page: what came out, curves, experts, drafts, samples, configuration, machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from elara.errors import ElaraError
from elara.report import page
from elara.report.comparison import title_of
from elara.report.figures import panels
from elara.report.measures import amount, clock
from elara.report.metrics import read_metrics
from elara.report.outcome import Outcome, log_tail
from elara.runs import Run

TITLES = {"loss": "Loss", "experts": "Experts", "acceptance": "Drafts", "training": "Training"}
LOG_LINES = 40
WIDEST = 5.6  # inches of a diagram, so that its letters are still read on a phone


def run_page(outcome: Outcome) -> str:
    """The whole page of one run."""
    run = outcome.run
    title = title_of(run.path)
    head = [
        page.heading(run.path, title),
        page.state(_state_words(outcome), outcome.state),
        page.chips(outcome.overrides.items()),
    ]
    return page.document(f"{title}: Elara", "\n".join([*head, run_body(outcome, "run", level=2)]))


def run_body(outcome: Outcome, salt: str, *, level: int) -> str:
    """What there is to see of a run. salt: sets it apart from other runs on the page; level: of its headings."""
    parts = [alert(outcome), page.figures(headline(outcome))]
    parts += _pictures(outcome.run, salt, level)
    parts += [
        _part("Samples", _samples(outcome.run.samples), level),
        _part("Configuration", _configuration(outcome), level),
        _part("Code and machine", _environment(outcome.summary), level),
    ]
    return "\n".join(part for part in parts if part)


def headline(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """The figures that one asks for first, with their words."""
    if outcome.best:
        step, loss = outcome.best
        yield f"{loss:.4f}", f"held-out loss, nats per token, best at step {step:,}"
    elif (training := outcome.last("train/loss_ar")) is not None:
        yield f"{training:.4f}", "training loss, nats per token; not validated yet"
    for name, form, words in (
        ("val/bits_per_char", ".3f", "bits per character"),
        ("val/perplexity", ".2f", "perplexity"),
        ("val/tokens_per_forward", ".2f", "tokens per forward pass"),
    ):
        if (value := outcome.at_best(name)) is not None:
            yield format(value, form), words
    if outcome.step:
        yield f"{outcome.step:,}", f"steps{_of_total(outcome.run)}"
    if (speed := outcome.median("train/tokens_per_second")) is not None:
        yield amount(speed), "tokens per second, median"
    if (seconds := outcome.median("train/seconds_per_step")) is not None:
        yield f"{seconds:.3g} s", "per step, median"
    if outcome.parameters is not None:
        yield amount(outcome.parameters), "parameters"
    if outcome.wall_seconds is not None:
        yield clock(outcome.wall_seconds), "wall time"


def _state_words(outcome: Outcome) -> str:
    if outcome.state != "unfinished":
        return outcome.state
    return f"not finished, at step {outcome.step:,}{_of_total(outcome.run)}"


def _of_total(run: Run) -> str:
    """` of 800`, if the configuration tells."""
    trainer = _configured(run).get("trainer")
    total = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
    return f" of {total:,}" if isinstance(total, int) else ""


def alert(outcome: Outcome) -> str:
    """What the reader of a run that is not finished must know."""
    run, tail = outcome.run, log_tail(outcome.run.path / "error.log", LOG_LINES)
    if outcome.state == "failed":
        told = tail or log_tail(run.job_log, LOG_LINES)
        return f'<div class="alert bad"><b>Failed:</b> {escape(outcome.error or "")}</div>' + page.folded(
            "The end of its log", page.log(told), opened=True
        )
    if outcome.state == "pruned":
        return '<div class="alert">The search gave this trial up before its last step.</div>'
    if outcome.state == "missing":
        return '<div class="alert bad">This job never began.</div>'
    if outcome.state == "finished":
        return ""
    if tail:
        return (
            f'<div class="alert bad">Ended with an error.</div>{page.folded("error.log", page.log(tail), opened=True)}'
        )
    when = f"; its last figures are of {_time(run.metrics)}" if run.metrics.exists() else "; it has no figures yet"
    return f'<div class="alert">Still training, or ended without a word{when}. This page shows what there is.</div>'


def _pictures(run: Run, salt: str, level: int) -> Iterator[str]:
    try:
        found = panels(read_metrics(run.metrics))
    except ElaraError:
        return
    for name, title in TITLES.items():
        if name in found:
            shown = [(replace(panel, size=(min(panel.size[0], WIDEST), panel.size[1])), title) for panel in found[name]]
            yield _part(title, page.pictures(shown, f"{salt}/{name}", "small" if name == "training" else ""), level)


def _part(title: str, content: str, level: int) -> str:
    return f"<h{level}>{title}</h{level}>{content}" if content else ""


def _samples(path: Path) -> str:
    """The texts of every validation, the newest open."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
    _, *blocks = re.split(r"^==== step (\d+) ====\n", text, flags=re.MULTILINE)
    made = []
    for step, block in zip(blocks[::2], blocks[1::2], strict=True):
        texts = "".join(f'<div class="sample">{_sample(one)}</div>' for one in block.strip("\n").split("\n----\n"))
        made.append((f"after step {int(step):,}", texts))
    return "".join(page.folded(title, texts, opened=i == 0) for i, (title, texts) in enumerate(reversed(made)))


def _sample(text: str) -> str:
    """A text, the prompt that stands before it in brackets told apart."""
    prompt = re.match(r"\[(.*?)\]", text, re.DOTALL)
    if prompt is None:
        return escape(text)
    return f'<span class="prompt">{escape(prompt[1])}</span>{escape(text[prompt.end() :])}'


def _configuration(outcome: Outcome) -> str:
    settings = _configured(outcome.run)
    if not settings:
        return ""
    lines = "\n".join(_lines(settings, "", set(outcome.overrides)))
    return page.folded("all settings, what was given on the command line is marked",
                       f'<pre class="config">{lines}</pre>')  # fmt: skip


def _configured(run: Run) -> dict[str, Any]:
    try:
        found = yaml.safe_load(run.config.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(settings: Mapping[str, Any], above: str, given: set[str], depth: int = 0) -> Iterator[str]:
    """YAML by line as HTML; a key that is in `given`, and all below it, is marked."""
    for key, value in settings.items():
        path = f"{above}.{key}".lstrip(".")
        nested = isinstance(value, Mapping) and value
        shown = (
            ""
            if nested
            else " " + yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n...")[0].strip()
        )
        line = f"<i>{escape(str(key))}:</i>{escape(shown)}"
        marked = any(f"{path}.".startswith(f"{one}.") for one in given)
        yield "  " * depth + (f"<mark>{line}</mark>" if marked else line)
        if isinstance(value, Mapping):
            yield from _lines(value, path, given, depth + 1)


def _environment(summary: Mapping[str, Any]) -> str:
    hardware, versions = summary.get("hardware", {}), summary.get("versions", {})
    gpus = hardware.get("gpus") or []
    memory = hardware.get("memory_gib")
    rows = [
        ("commit", str(summary.get("commit") or "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("processor", str(hardware.get("processor") or "")),
        ("cores, threads", f"{hardware['cores']}, {hardware.get('threads')}" if "cores" in hardware else ""),
        ("memory", f"{memory} GiB" if memory else ""),
        ("GPUs", ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))),
        ("system", str(hardware.get("platform") or "")),
        ("precision", str(summary.get("precision") or "")),
        ("processes", str(summary.get("world_size") or "")),
    ]
    return page.plain_table(rows)


def _time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
