"""The frame of a page: one file that needs no network, light or dark as the reader's machine is."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from elara.report.figures import Panel
from elara.report.svg import inline
from elara.runs import project_root

DOCUMENT = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
<footer>Made {time} by <code>python -m elara.report</code>.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def document(title: str, body: str) -> str:
    """A whole page around `body`. Nothing is loaded, and no script but the page's own runs in it."""
    ours = files("elara.report")
    style, script = (ours.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return DOCUMENT.format(
        title=escape(title), policy=policy, style=style, body=body, script=script,
        time=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )  # fmt: skip


def heading(folder: Path, title: str) -> str:
    """The title under the folder's place in the project."""
    place, root = folder.resolve(), project_root()
    shown = place.relative_to(root) if place.is_relative_to(root) else place
    return f'<p class="kicker">{escape(str(shown))}</p>\n<h1>{escape(title)}</h1>'


def figures(cells: Iterable[tuple[str, str]], kind: str = "") -> str:
    """The headline: value and words per cell, the first counts most. kind: `few` cells of many words."""
    made = [f"<div><b>{escape(value)}</b><span>{escape(words)}</span></div>" for value, words in cells if value]
    if not made:
        return ""
    return f'<div class="figures {kind}">{"".join([made[0].replace("<div>", "<div class=first>", 1), *made[1:]])}</div>'


def pictures(panels: Sequence[tuple[Panel, str]], salt: str, kind: str = "") -> str:
    """Diagrams, each with what it shows. kind: `small` for three in a row."""
    made = []
    for i, (panel, label) in enumerate(panels):
        wide = " class=wide" if panel.size[0] > 6 else ""
        rows = round(panel.size[1] / panel.size[0] / 0.68)  # of the ordinary diagrams beside it
        tall = f' style="grid-row: span {rows}"' if 1 < rows < len(panels) else ""
        svg = inline(panel, escape(label), f"{salt}/{i}")
        made.append(f'<figure{wide}{tall}><div class="scroll">{svg}</div></figure>')
    return f'<div class="panels {kind}">{"".join(made)}</div>' if made else ""


def image(path: Path) -> str:
    """A PNG file, embedded."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></figure>'


def plain_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows if value)
    return f'<div class="table"><table class="plain"><tbody>{body}</tbody></table></div>' if body else ""


@dataclass(frozen=True)
class Cell:
    """Of a sortable table. shown: HTML; value: what it is sorted by."""

    shown: str
    value: str
    number: bool = False


def sortable(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, best: bool) -> str:
    """A table that sorts by a click on a column's head; best: the first row is to stand out."""

    def kind(numbers: Iterable[bool]) -> str:
        return ' class="number"' if all(numbers) else ""

    columns = zip(head, zip(*rows, strict=True), strict=True)
    heads = [
        f'<th scope="col"{kind(cell.number for cell in cells)}><button type="button">{escape(name)}</button></th>'
        for name, cells in columns
    ]
    lines = []
    for i, row in enumerate(rows):
        cells = [f'<td{kind([cell.number])} data-value="{escape(cell.value)}">{cell.shown}</td>' for cell in row]
        lines.append(f"<tr{' class=best' if best and i == 0 else ''}>{''.join(cells)}</tr>")
    body = f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{chr(10).join(lines)}</tbody>"
    return f'<div class="table"><table class="sortable">{body}</table></div>'


def chips(overrides: Iterable[tuple[str, str]]) -> str:
    """Overrides as small labels."""
    made = [f"<code>{escape(f'{key}={value}')}</code>" for key, value in overrides]
    return f'<div class="chips">{"".join(made)}</div>' if made else ""


def folded(summary: str, content: str, *, opened: bool = False, kind: str = "", name: str = "") -> str:
    """A part that opens by a click. summary and content are HTML."""
    marks = "".join([f' class="{kind}"' if kind else "", f' id="{escape(name)}"' if name else "", " open" * opened])
    return f"<details{marks}><summary>{summary}</summary>{content}</details>"


def log(lines: Sequence[str]) -> str:
    return f'<pre class="log">{escape(chr(10).join(lines))}</pre>' if lines else ""


def state(words: str, kind: str) -> str:
    return f'<span class="state {kind}">{escape(words)}</span>'
