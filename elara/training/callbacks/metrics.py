"""Log the training figures every `log_every_n_steps` steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer

from elara.data.batches import Batch
from elara.training.metrics import loss_figures, moe_figures
from elara.training.module import ElaraModule


class Metrics(Callback):
    """Losses, perplexity, rate, gradient norm and the balance of every MoE layer, as means since the last log.

    Its state makes a resumed run log what the uninterrupted one would have logged.
    """

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if not module.step_ends(batch_idx) or not module.logs:
            return
        means = [metric.read() for metric in _metrics(module).values()]
        figures = {f"train/{name}": value for found in means for name, value in found.items()}
        if "train/loss_ar" in figures:
            figures |= loss_figures("train", figures["train/loss_ar"], module.chars_per_token)
        figures["train/lr"] = module.lr
        if module.load is not None and module.load.numel():
            figures |= moe_figures(module.load, module.model.config.moe_layers)
            module.load = None
        module.check_finite(figures)
        module.record(figures)

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        # all ranks' sums, because every rank reads the same state when it resumes
        sums = {}
        for name, metric in _metrics(module).items():
            total = metric.total.clone()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(total)
            sums[name] = total.cpu()
        checkpoint["elara_metrics"] = {"sums": sums, "load": module.load, "latest": dict(module.latest)}

    def on_load_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("elara_metrics")
        if state is None:
            return
        for name, metric in _metrics(module).items():
            total = state["sums"].get(name, metric.total)
            if total.shape != metric.total.shape:  # other losses than before: another teacher
                continue
            metric.total = (total if trainer.global_rank == 0 else torch.zeros_like(total)).to(metric.total.device)
        module.load = None if state["load"] is None else state["load"].to(module.device)
        module.latest = dict(state["latest"])


def _metrics(module: ElaraModule) -> dict[str, Any]:
    return {"train": module.train_means, "written": module.written_means, "grad": module.grad_means}
