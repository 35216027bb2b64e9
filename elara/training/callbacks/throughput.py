"""Tokens per second, seconds per step and, where the hardware's peak is known, model FLOPs utilisation."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, Trainer

from elara.config import ElaraConfig
from elara.data.batches import Batch
from elara.model import ElaraLM

# Dense bf16 peak in TFLOP/s by a part of the device's name, from the makers' data sheets; first match wins
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "RTX 5090": 209.0,
    "RTX 4090": 165.0,
    "RTX 4080": 97.0,
    "RTX 3090": 71.0,
    "RTX A6000": 155.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None when it is not in the table (a CPU never is)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


def flops_per_token(model: ElaraLM, seq: int, depth: int | None = None) -> float:
    """Training FLOPs per clean token, forward and backward, mask section included (PaLM, arXiv 2204.02311, app. B).

    6 per active weight and token, with every recursion pass counted, plus 12 * n_embd * keys for attention: half the
    clean tokens, which a clean token and a mask see alike on average. Both heads count; recomputed activations do not,
    and neither do lookups in the embedding. depth: recursion passes, default the model's own.
    """
    config = model.config
    section = round(config.tidar.block_fraction * seq) / seq if config.tidar.block_length else 0.0
    block = sum(_active(config, module) for module in model.blocks)
    attention = 12 * config.model.n_layer * config.model.n_embd * seq / 2
    heads = model.embed.weight.numel() * (1 + section)
    if model.chain is not None:
        heads += section * sum(p.numel() for p in model.chain.parameters() if p.dim() > 1)
    return (1 + section) * (depth or config.trm.depth) * (6 * block + attention) + 6 * heads


def _active(config: ElaraConfig, block: torch.nn.Module) -> float:
    share = config.moe.top_k / config.moe.num_experts if config.moe.num_experts else 1.0
    matrices = [(name, p.numel()) for name, p in block.named_parameters() if p.dim() > 1]
    return sum(count * (share if ".experts." in name else 1.0) for name, count in matrices)


class Throughput(Callback):
    """Measures training alone: the clock stands still during validation."""

    def __init__(self) -> None:
        self._tokens = 0
        self._steps = 0
        self._flops = 0.0
        self._per_token: dict[tuple[int, int | None], float] = {}  # FLOPs by length and recursion depth
        self._since: float | None = None
        self._pause = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if self._since is None:
            self._since = time.perf_counter()
        if peak_flops(module.device):  # at the batch's end the depth may be that of the next step
            self._flops += self._flops_of(module, batch) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if self._since is not None:
            self._since += time.perf_counter() - self._pause

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._tokens += batch.tokens[:, 1:].numel() * trainer.world_size
        if not module.step_ends(batch_idx):
            return
        self._steps += 1
        if not module.logs or self._since is None:
            return
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rate = self._tokens / seconds
        figures = {"train/tokens_per_second": rate, "train/seconds_per_step": seconds / self._steps}
        if peak := peak_flops(module.device):
            figures["train/mfu"] = self._flops / seconds / (peak * trainer.world_size)
        module.record(figures)
        self._tokens, self._steps, self._flops, self._since = 0, 0, 0.0, now

    def _flops_of(self, module: Any, batch: Batch) -> float:
        """Training FLOPs of this rank's batch, at the depth of its step."""
        rows, length = batch.tokens[:, 1:].shape
        key = (length, module.depth())
        if key not in self._per_token:
            self._per_token[key] = flops_per_token(module.model, *key)
        return rows * length * self._per_token[key]
