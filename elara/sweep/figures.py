"""The pictures of a search as files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.figure import Figure

from elara.report.style import GREY, STYLE
from elara.sweep.config import SearchConfig
from elara.sweep.history_figure import history
from elara.sweep.importance import Importance
from elara.sweep.keys_figure import importance, slices
from elara.sweep.parallel_figure import parallel
from elara.sweep.records import Record
from elara.sweep.space import Parameter
from elara.sweep.view import View


def draw(
    records: Sequence[Record], wanted: SearchConfig, space: Sequence[Parameter], shares: Sequence[Importance] | None
) -> dict[str, bytes]:
    """PNG files by name; those that there is something to show for."""
    view = View(records, wanted, space, shares)
    if not view.those("complete") and not view.those("pruned"):
        return {}
    pictures: dict[str, Callable[[View], Figure | None]] = {
        "history.png": history,
        "importance.png": importance,
        "slices.png": slices,
        "parallel.png": parallel,
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, picture in pictures.items():
            figure = picture(view)
            if figure is not None:
                figure.suptitle(f"search {wanted.study}", x=0.01, ha="left", color=GREY, fontsize=9)
                out = io.BytesIO()
                figure.savefig(out, bbox_inches="tight")
                drawn[name] = out.getvalue()
    return drawn
