"""Jobs on a Ray cluster. A job is a plain process on some machine, so sending it there is all there is to do.

Hydra's plugin for Ray pins old packages and brings a cloud's tools with it; this needs Ray alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from elara.errors import ElaraError


class Cluster:
    """Runs functions on Ray's workers, as many at once as the cluster has room for.

    address: `auto` is the cluster that `ray start` made, None one on this machine for as long as this process lives.
    num_cpus, num_gpus: what a job reserves. Raises ElaraError when there is no Ray or no cluster.
    """

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float) -> None:
        try:
            import ray  # heavy, an extra, and wanted only here
        except ModuleNotFoundError as error:
            raise ElaraError("launcher=ray needs the package ray: pip install 'elara-hivemind[ray]'") from error
        try:
            ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ElaraError(
                f"sweep.ray.address={address}: no Ray cluster answers there; `ray start --head` starts one"
            ) from error
        self._ray: Any = ray
        # a job that failed has said so itself, and Ray must not try it again over what it left
        self._options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": 0}
        self._sent: list[Any] = []

    def send(self, function: Callable[[Any], object], argument: object) -> None:
        """Queue one call."""
        self._sent.append(self._ray.remote(**self._options)(function).remote(argument))

    def wait(self) -> None:
        """Wait for all calls, those included whose worker was lost. An interrupt is passed on to them, then raised."""
        try:
            for call in self._sent:
                try:
                    self._ray.get(call)
                except self._ray.exceptions.RayError as error:
                    print(f"a job was lost: {str(error).splitlines()[0]}", flush=True)
        except BaseException:
            for call in self._sent:
                self._ray.cancel(call)
            self._ray.wait(self._sent, num_returns=len(self._sent))
            raise
        finally:
            self._ray.shutdown()
