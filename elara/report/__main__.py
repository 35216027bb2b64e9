"""One page about a run, a sweep or a search: `python -m elara.report [folder or name] [--output FILE]`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from elara.cli import guard
from elara.errors import ElaraError
from elara.runs import say_reading


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are one line, like those of the other commands."""

    def error(self, message: str) -> NoReturn:
        raise ElaraError(f"{message}; see --help")


def report() -> None:
    """Write the page that the command line asks for."""
    parser = Parser(
        prog="python -m elara.report",
        description="Write one HTML page about a run, a sweep or a search: figures, curves, experts, samples, "
        "configuration, what failed. It needs no network, so it can be sent around. A run may still be training.",
    )
    parser.add_argument("where", nargs="?", help="a run, sweep or search folder, or a name (the newest of it); "
                        "default: the newest run")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in that folder")
    wanted = parser.parse_args()
    from elara.report.write import find_folder, write_report  # matplotlib takes a second to import

    folder = find_folder(wanted.where)
    say_reading(folder)
    page, *others = write_report(folder, wanted.output)
    print(f"written: {page} ({page.stat().st_size / 1e3:,.0f} kB)")
    if others:
        print(f"and a page for each of its {len(others)} runs, {others[0]} and so on")


def main() -> None:
    """Console script `elara-report`."""
    guard(report)


if __name__ == "__main__":
    main()
