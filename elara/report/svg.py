"""Pictures as SVG inside a page: text stays text in the page's font, colours follow its light or dark mode."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from elara.report.figures import Panel
from elara.report.style import DARK, GREY, PALETTE, STYLE

# matplotlib's colours -> CSS of the page
COLOURS = {
    "#000000": "currentColor",
    DARK: "currentColor",
    GREY: "var(--soft)",
    str(STYLE["grid.color"]): "var(--line)",
    **{colour: f"var(--c{i})" for i, colour in enumerate(PALETTE)},
}


def inline(panel: Panel, label: str, salt: str) -> str:
    """A panel as an <svg> element.

    label: says what is seen, for those who hear the page. salt: differs between the pictures of a page, so that their
    ids do.
    """
    options: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "savefig.facecolor": "none",
        "axes.facecolor": "none",
    }
    out = io.StringIO()
    with matplotlib.rc_context(STYLE | options):  # type: ignore[arg-type]
        figure = Figure(figsize=panel.size, layout="constrained")
        panel.draw(figure)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _tidied(out.getvalue(), label)


def _tidied(svg: str, label: str) -> str:
    """The element alone, without what a page has no use for."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*</defs>| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    svg = svg.replace("xlink:href=", "href=")
    wanted = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in wanted else "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"(font: (?:\w+ )*[\d.]+px) '[^;\"]*", r"\1 var(--font)", svg)
    for theirs, ours in COLOURS.items():
        svg = svg.replace(theirs, ours)
    svg = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', lambda match: _rounded(match[0]), svg)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    widest = f"max-width: {1.5 * float(box[1]):.0f}px"  # letters need not grow with the reader's screen
    head = f'<svg viewBox="0 0 {box[1]} {box[2]}" style="{widest}" role="img" aria-label="{label}">'
    svg = re.sub(r"<svg[^>]*>", lambda match: head, svg, count=1)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _rounded(attribute: str) -> str:
    """Coordinates by hundredths of a point."""
    return re.sub(r"-?\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", attribute)
