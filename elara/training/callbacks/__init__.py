"""What happens around the steps, one callback per file."""

from elara.training.callbacks.acceptance import Acceptance
from elara.training.callbacks.checkpoint import Checkpoint
from elara.training.callbacks.ending import Ending
from elara.training.callbacks.exact_resume import ExactResume
from elara.training.callbacks.interrupt import Interrupt
from elara.training.callbacks.metrics import Metrics
from elara.training.callbacks.monitoring import Monitoring
from elara.training.callbacks.plots import Plots
from elara.training.callbacks.profiler import StepProfiler
from elara.training.callbacks.progress import Progress
from elara.training.callbacks.samples import Samples
from elara.training.callbacks.summary import Summary
from elara.training.callbacks.throughput import Throughput

__all__ = [
    "Acceptance",
    "Checkpoint",
    "Ending",
    "ExactResume",
    "Interrupt",
    "Metrics",
    "Monitoring",
    "Plots",
    "Progress",
    "Samples",
    "StepProfiler",
    "Summary",
    "Throughput",
]
