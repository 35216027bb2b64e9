"""Results on screen, as JSON and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from elara.evaluation.calls import MEASURES, CallRates, Share
from elara.evaluation.loss import difference
from elara.evaluation.result import Result
from elara.evaluation.text import HeldOutText
from elara.report.style import BLUE, GREEN, GREY, ORANGE, STYLE

COLOURS = (BLUE, ORANGE, GREEN, "#8456a8", "#b83b5e", GREY)
Row = tuple[str, list[str]]  # what, and one cell per checkpoint


def table(results: Sequence[Result], text: HeldOutText) -> Table:
    """One column per checkpoint; only what was measured of any of them has a row."""
    title = f"{text.title}: {len(text.passages)} passages of {text.documents} documents, {text.bytes:,} bytes"
    made = Table("", *[result.name for result in results], title=title)
    for column in made.columns[1:]:
        column.justify = "right"
    for rows in (_loss_rows, _draft_rows, _agreement_rows, _speed_rows, _call_rows, _task_rows):
        added = [row for row in rows(results) if any(row[1])]
        for what, cells in added:
            made.add_row(what, *[cell or "-" for cell in cells])
        if added:
            made.add_section()
    return made


def write(results: Sequence[Result], text: HeldOutText, about: dict[str, Any], folder: Path) -> list[Path]:
    """evaluation.json and evaluation.png in `folder`; returns the files.

    about: further plain values for the JSON file's head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = {"title": text.title, "passages": len(text.passages), "documents": text.documents, "bytes": text.bytes}
    head = {**about, "torch": torch.__version__, "threads": torch.get_num_threads(), "text": corpus}
    plain = {**head, "results": [result.to_dict() for result in results]}
    (folder / "evaluation.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        picture(results, text).savefig(folder / "evaluation.png", bbox_inches="tight")
    return [folder / "evaluation.json", folder / "evaluation.png"]


def picture(results: Sequence[Result], text: HeldOutText) -> Figure:
    """Bits per byte, acceptance by position, speed, tool calls, tasks: a panel for each that was measured."""
    panels: list[Callable[[Axes, Sequence[Result]], None]] = [_bits]
    panels += [_reach] if any(result.drafts and result.drafts.acceptance for result in results) else []
    panels += [_rates] if any(result.speed for result in results) else []
    panels += [_calls] if any(result.tool_calls for result in results) else []
    panels += [_scores] if any(_accuracies(result) for result in results) else []
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    bars = max(len(results), sum(len(result.speed) for result in results) / 2)
    tall = 3.0 + 0.3 * max(0, bars - 3)
    figure = Figure(figsize=(5.6 * columns, tall * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, draw in zip(places, panels, strict=False):
        draw(axes, results)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(text.title, x=0.01, ha="left", color=GREY, fontsize=9)
    return figure


def _cells(results: Sequence[Result], show: Callable[[Result], str | None]) -> list[str]:
    return [show(result) or "" for result in results]


def _loss_rows(results: Sequence[Result]) -> list[Row]:
    def figure(show: Callable[[Any], str]) -> list[str]:
        return _cells(results, lambda result: show(result.loss) if result.loss else None)

    rows: list[Row] = [
        ("parameters", _cells(results, lambda result: f"{result.parameters:,}")),
        ("bits per byte", figure(lambda loss: _with_error(loss.bits_per_byte, loss.bits_per_byte_error, 4))),
        ("bits per character", figure(lambda loss: f"{loss.bits_per_char:.4f}")),
        ("loss, nats per token", figure(lambda loss: _with_error(loss.loss, loss.loss_error, 4))),
        ("perplexity per token", figure(lambda loss: f"{loss.perplexity:.3f}")),
        ("tokens scored", figure(lambda loss: f"{loss.tokens:,}")),
    ]
    first = results[0].loss
    if first is not None and len(results) > 1:
        losses = [result.loss for result in results[1:]]
        cells = [_with_error(*difference(loss, first), 4, sign=True) if loss else "" for loss in losses]
        rows.insert(2, (f"  against {results[0].name}, paired", ["", *cells]))
    return rows


def _draft_rows(results: Sequence[Result]) -> list[Row]:
    rows: list[Row] = []
    longest = max((len(result.drafts.diffusion_loss) for result in results if result.drafts), default=0)
    if longest:
        losses = [result.drafts.diffusion_loss if result.drafts else [] for result in results]
        places = f"places 1-{longest}"
        rows.append((f"diffusion loss, {places}", [" ".join(f"{loss:.2f}" for loss in own) for own in losses]))
    temperatures = sorted({a.temperature for r in results if r.drafts for a in r.drafts.acceptance})
    for temperature in temperatures:
        way = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        own = [
            next((a for a in r.drafts.acceptance if a.temperature == temperature), None) if r.drafts else None
            for r in results
        ]
        rows.append((f"tokens per forward, {way}", [f"{a.tokens_per_forward:.2f}" if a else "" for a in own]))
        reach = [" ".join(f"{share:.0%}" for share in a.reach) if a else "" for a in own]
        rows.append((f"  drafts that reach 2, 3, ..., {way}", reach))
    return rows


def _agreement_rows(results: Sequence[Result]) -> list[Row]:
    rows: list[Row] = []
    for precision in dict.fromkeys(a.precision for result in results for a in result.agreement):
        own = [next((a for a in result.agreement if a.precision == precision), None) for result in results]
        more = [_with_error(a.difference, a.difference_error, 5, sign=True) if a else "" for a in own]
        rows.append((f"{precision} against float32, nats per token", more))
        rows.append((f"  {precision}, same best token", [f"{a.same_best:.2%}" if a else "" for a in own]))
    return rows


def _speed_rows(results: Sequence[Result]) -> list[Row]:
    rows: list[Row] = []
    for way in dict.fromkeys((s.mode, s.precision) for result in results for s in result.speed):
        own = [next((s for s in result.speed if (s.mode, s.precision) == way), None) for result in results]
        share = "" if way == ("ar", "float32") else " ({:.2f} x ar float32)"
        cells = [f"{s.tokens_per_second:.0f}{share.format(s.against_ar)}" if s else "" for s in own]
        rows.append((f"tokens/s, {' '.join(way)}", cells))
    return rows


def _call_rows(results: Sequence[Result]) -> list[Row]:
    """Of all questions every measure; of each family its arguments, in phrasings of training and in others."""
    every = [{(one.family, one.phrasing): one for one in r.tool_calls.rates} if r.tool_calls else {} for r in results]
    keys = list(dict.fromkeys(key for own in every for key in own))

    def cells(key: tuple[str, str], measure: str) -> list[str]:
        return [_with_interval(getattr(own[key], measure)) if key in own else "" for own in every]

    rows = [(f"tool calls, {measure}", cells(("all tools", "all"), measure)) for measure in MEASURES]
    for family, phrasing in keys:
        if family != "all tools" and phrasing != "all":
            measure = "arguments" if family != "talk" else "format"
            label = "arguments" if family != "talk" else "no call"
            rows.append((f"  {family}, {label}, phrasings {phrasing}", cells((family, phrasing), measure)))
    return rows


def _with_interval(share: Share) -> str:
    return f"{share.share:.1%} ({share.low:.0%}-{share.high:.0%} of {share.of})"


def _task_rows(results: Sequence[Result]) -> list[Row]:
    rows: list[Row] = []
    for task in dict.fromkeys(task for result in results for task in result.tasks):
        every = [result.tasks.get(task, {}) for result in results]
        for metric in dict.fromkeys(metric for own in every for metric in own):
            if metric.endswith("_stderr"):
                continue
            errors = [own.get(f"{metric}_stderr", math.nan) for own in every]
            cells = [
                _with_error(own[metric], error, 4) if metric in own else ""
                for own, error in zip(every, errors, strict=True)
            ]
            rows.append((f"{task}, {metric}", cells))
    return rows


def _with_error(value: float, error: float, digits: int, *, sign: bool = False) -> str:
    shown = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return shown if math.isnan(error) else f"{shown} ± {error:.{digits}f}"


def _bars(axes: Axes, results: Sequence[Result], values: Sequence[float], errors: Sequence[float], form: str) -> None:
    """A bar per checkpoint, best read from the top; the value stands behind the bar."""
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        spread = 0.0 if math.isnan(error) else error
        axes.barh(place, value, xerr=spread or None, color=_colour(place), height=0.62, ecolor="#444444")
        axes.text(value + spread, place, f"  {value:{form}}", va="center", fontsize=9)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.22 * max([*values, 1e-9]))


def _bits(axes: Axes, results: Sequence[Result]) -> None:
    values = [result.loss.bits_per_byte if result.loss else 0.0 for result in results]
    errors = [result.loss.bits_per_byte_error if result.loss else math.nan for result in results]
    _bars(axes, results, values, errors, ".3f")
    axes.set(title="Bits per byte", xlabel="held-out text, less is better; line = standard error")


def _reach(axes: Axes, results: Sequence[Result]) -> None:
    longest = 1
    for place, result in enumerate(results):
        for i, found in enumerate(result.drafts.acceptance if result.drafts else []):
            way = "greedy" if found.temperature == 0 else f"T={found.temperature:g}"
            shares = [1.0, *found.reach]
            longest = max(longest, len(shares))
            label = f"{result.name}, {way}: {found.tokens_per_forward:.2f} tokens per forward"
            style = ("-", "--", ":", "-.")[i % 4]
            axes.plot(range(1, len(shares) + 1), shares, f"o{style}", color=_colour(place), markersize=4, label=label)
    axes.set(title="Drafts that stand up to a position", xlabel="position in the draft (the first is the AR head's)",
             ylabel="share of drafts", xticks=range(1, longest + 1))  # fmt: skip
    axes.set_ylim(0, 1.05)
    axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _rates(axes: Axes, results: Sequence[Result]) -> None:
    bars = max(len(result.speed) for result in results)
    height = 0.8 / bars
    top = 0.0
    for place, result in enumerate(results):
        for i, speed in enumerate(result.speed):
            at = place + (i - (len(result.speed) - 1) / 2) * height
            rate = speed.tokens_per_second
            spread = [[max(0.0, rate - speed.low)], [max(0.0, speed.high - rate)]]
            shade = 1.0 if speed.mode == "ar" else 0.6
            axes.barh(at, rate, height=0.9 * height, color=_colour(place), alpha=shade)
            axes.errorbar(rate, at, xerr=spread, ecolor="#444444")
            words = f"  {rate:.0f}  {speed.mode} {speed.precision}"
            axes.text(max(rate, speed.high), at, words, va="center", fontsize=8 if bars < 5 else 6.5)
            top = max(top, rate, speed.high)
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.45 * top)
    axes.set(title="Generation speed", xlabel="tokens per second, greedy; line = quartiles of the rounds")


def _calls(axes: Axes, results: Sequence[Result]) -> None:
    """A group of bars per family: right arguments, solid in phrasings of training, pale in others."""
    found: list[tuple[int, CallRates]] = []
    for place, result in enumerate(results):
        rates = result.tool_calls.rates if result.tool_calls else []
        found += [(place, one) for one in rates if one.family != "all tools" and one.phrasing != "all"]
    families = list(dict.fromkeys(one.family for _, one in found))
    height = 0.8 / (2 * len(results))
    for place, one in found:
        share = one.format if one.family == "talk" else one.arguments
        at = families.index(one.family) + (2 * place + (one.phrasing != "seen") - len(results) + 0.5) * height
        spread = [[share.share - share.low], [share.high - share.share]]
        shade = 1.0 if one.phrasing == "seen" else 0.55
        axes.barh(at, share.share, height=0.9 * height, color=_colour(place), alpha=shade)
        axes.errorbar(share.share, at, xerr=spread, ecolor="#444444")
        axes.text(share.high, at, f"  {share.share:.0%}", va="center", fontsize=8)
    axes.set_yticks(range(len(families)), ["talk\n(no call)" if name == "talk" else name for name in families])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.15)
    axes.set(title="Tool calls with the right arguments", xlabel="share; pale = phrasings not in training; line = 95 %")


def _accuracies(result: Result) -> dict[str, tuple[float, float]]:
    """Of each task the first score between 0 and 1, with its standard error."""
    found = {}
    for task, metrics in result.tasks.items():
        for metric in ("acc", "exact_match", "acc_norm", "f1"):
            if metric in metrics:
                found[f"{task}\n{metric}"] = (metrics[metric], metrics.get(f"{metric}_stderr", math.nan))
                break
    return found


def _scores(axes: Axes, results: Sequence[Result]) -> None:
    every = [_accuracies(result) for result in results]
    tasks = list(dict.fromkeys(task for own in every for task in own))
    height = 0.8 / len(results)
    for place, own in enumerate(every):
        for task, (value, error) in own.items():
            at = tasks.index(task) + (place - (len(results) - 1) / 2) * height
            spread = 0.0 if math.isnan(error) else error
            axes.barh(at, value, xerr=spread or None, height=0.9 * height, color=_colour(place), ecolor="#444444")
            axes.text(value + spread, at, f"  {value:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.12)
    axes.set(title="Tasks", xlabel="share of the items that were right, in the colours of the checkpoints")


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
