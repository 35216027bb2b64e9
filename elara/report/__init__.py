"""What came out of runs, for eyes: pictures, tables of sweeps, a page to send around."""

from elara.report.comparison import Comparison
from elara.report.summary import print_summary, summarize

__all__ = ["Comparison", "print_summary", "summarize"]
