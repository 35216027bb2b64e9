"""How the ranks of a run find each other and share the work: strategies and environments for lightning.Trainer."""

from __future__ import annotations

import os
from datetime import timedelta

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from elara import launch


def ddp(timeout: float = 600.0) -> DDPStrategy:
    """Data parallel: every rank holds the whole model, gradients are averaged once per optimizer step.

    Every weight takes part in every step (experts are stacked tensors), so nothing is searched for unused ones; the
    selection biases move alike on all ranks, so no buffer is sent either. timeout: seconds that a rank waits for the
    others before it gives up.
    """
    return DDPStrategy(
        timeout=timedelta(seconds=timeout), broadcast_buffers=False, gradient_as_bucket_view=True
    )


def environment() -> list[ClusterEnvironment]:
    """The plugin that tells Lightning who started this process, where it would guess otherwise.

    Ranks that we started ourselves, and a process alone, are no SLURM tasks, even inside a SLURM job. SLURM tasks are
    not requeued by Lightning, which would save and submit behind the back of `callbacks.interrupt`.
    """
    if launch.local_ranks() is not None:
        return []  # torchrun
    if launch.is_slurm_task() and launch.ERRORS not in os.environ:
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()]
