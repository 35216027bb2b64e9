"""The jobs of a sweep on a Ray cluster: a launcher for Hydra.

The plugin hydra-ray-launcher pins old packages and brings a cloud's tools with it; a job here is a plain process, so
sending its description to a worker is all there is to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from elara.errors import ElaraError, Interrupted
from elara.sweep.multirun import Job, execute, go_on


@dataclass
class RayConfig:
    """Keys of `hydra.launcher` with `launcher=ray`."""

    _target_: str = "elara.sweep.ray_launcher.RayLauncher"
    address: str | None = None  # auto = the cluster that `ray start` made; null = one on this machine for this sweep
    num_cpus: float = 1  # cores that a job reserves
    num_gpus: float = 0  # GPUs that a job reserves, and sees


class RayLauncher(Launcher):
    """Sends every job to a Ray worker, as many at once as the cluster has room for."""

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float) -> None:
        self.address, self.resources = address, {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self.config: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and wait for them; raises ElaraError when there is no Ray or no cluster."""
        try:
            import ray  # heavy, an extra, and wanted only here
        except ModuleNotFoundError as error:
            raise ElaraError("launcher=ray needs the package ray: pip install 'elara-hivemind[ray]'") from error
        sweep = Path(str(self.config.hydra.sweep.dir))
        try:
            ray.init(address=self.address, log_to_driver=True, include_dashboard=False, logging_level="error")
        except ConnectionError as error:
            message = f"hydra.launcher.address={self.address}: no Ray cluster answers; `ray start --head` starts one"
            raise ElaraError(message) from error
        # a job that failed has said so itself; asking Ray to try it again would train over what it left
        remote = ray.remote(max_retries=0, **self.resources)(execute)
        jobs = [Job(sweep, initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        sent = [remote.remote(job) for job in jobs]
        try:
            ray.get(sent)
        except KeyboardInterrupt as error:
            for task in sent:
                ray.cancel(task)
            ray.wait(sent, num_returns=len(sent))
            raise Interrupted(f"sweep interrupted; go on with: {go_on(sweep)}") from error
        finally:
            ray.shutdown()
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED) for job in jobs]


def register() -> None:
    """Make the launcher known to Hydra as `hydra/launcher=elara_ray`."""
    Plugins.instance().register(RayLauncher)
    ConfigStore.instance().store(group="hydra/launcher", name="elara_ray", node=RayConfig, provider="elara")
