"""Fully sharded data parallel training (FSDP2) that computes what one process would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from elara import shards
from elara.checkpoint import OPTIMIZER, SHARDS
from elara.model import ElaraLM


@contextmanager
def gathered(model: ElaraLM) -> Iterator[None]:
    """Whole weights on every rank while this lasts, for what rank 0 does alone; all ranks enter it together.

    A model that is not sharded is left as it is.
    """
    parts = {name: part for name, part in model.named_modules() if isinstance(part, FSDPModule)}
    for part in parts.values():
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for name, part in parts.items():
            part.set_reshard_after_forward(bool(name), recurse=False)  # the losses need the root's heads
            part.reshard()


class FSDP(ModelParallelStrategy):
    """Every rank holds a shard of each block's weights, gradients and optimizer state (ZeRO-3, arXiv 1910.02054).

    Weights are gathered in float32 and autocast decides what runs in bf16: the router stays in float32. A model is
    built on rank 0 alone; checkpoints are written in shards by all ranks and read by any number of them. Accumulation
    reduces every micro-batch: keeping whole gradients until the last one would cost what sharding saves.

    timeout: seconds that a rank waits for the others before it gives up.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        super().__init__(tensor_parallel_size=1, timeout=timedelta(seconds=timeout))

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, model: ElaraLM) -> None:
        """Shard a model that rank 0 has whole and the others on the meta device; a sharded one is left as it is."""
        if isinstance(model, FSDPModule):
            return
        whole = model.state_dict() if self.global_rank == 0 else {}
        mesh = self.device_mesh["data_parallel"]
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=self.root_device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, whole, options=options)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write weights and optimizer state in shards beside the trainer's state; rank 0 says where."""
        path = Path(self.broadcast(filepath))
        module: Any = self.lightning_module
        shards.write(path.parent / SHARDS, module.saved_weights)
        module.saved_weights = {}
        (optimizer,) = checkpoint.pop("optimizer_states")
        shards.write(path.parent / OPTIMIZER, optimizer)
        if self.global_rank == 0:
            torch.save(checkpoint, path)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore the optimizer from its shards; the weights came before, with `elara.checkpoint`."""
        path = Path(self.broadcast(checkpoint_path))
        (optimizer,), model = self.optimizers, self.model
        assert model is not None
        state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
        shards.read_into(path.parent / OPTIMIZER, state)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
        found: dict[str, Any] = torch.load(path, weights_only=True)
        return found
