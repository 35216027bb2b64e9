"""Measure how far TiDAR's drafts reach on held-out text."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer
from torch import Tensor

from elara.data.batches import Batch
from elara.decoding import SamplingConfig, measure_acceptance, writable
from elara.errors import never_fatal
from elara.training.sharding import gathered


class Acceptance(Callback):
    """After every validation a few held-out prompts are continued by TiDAR, in one batch on rank 0.

    Records val/tokens_per_forward and val/accept/2 ... (share of the drafts whose first 2, 3, ... tokens all stood; the
    first always does). Models without a diffusion head are passed over.

    Args:
        prompts: rows of the first validation batch to continue.
        prompt_tokens: tokens of each row that are read.
        new_tokens: tokens written per row.
        temperature: 0 = greedy.
    """

    def __init__(
        self, prompts: int = 8, prompt_tokens: int = 32, new_tokens: int = 48, temperature: float = 0.0
    ) -> None:
        self.prompts, self.prompt_tokens = prompts, prompt_tokens
        self.sampling = SamplingConfig(mode="tidar", max_new_tokens=new_tokens, temperature=temperature)
        self._batch: Tensor | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._batch = batch.tokens[: self.prompts, : self.prompt_tokens]

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if module.model.config.tidar.block_length < 2 or self._batch is None:
            return
        with gathered(module.model):
            if trainer.is_global_zero:
                with never_fatal("measuring the acceptance of drafts"):
                    self._measure(module, self._batch)

    def _measure(self, module: Any, batch: Tensor) -> None:
        model = module.model
        rows = [[token for token in row if token >= 0] for row in batch.tolist()]
        found = measure_acceptance(
            model,
            [row for row in rows if row],
            self.sampling,
            module.tokenizer.mask_id,
            allowed=writable(module.tokenizer, model.config.vocab_size),
        )
        figures = {f"val/accept/{i + 2}": share for i, share in enumerate(found.reach)}
        module.record({"val/tokens_per_forward": found.tokens_per_forward, **figures})
