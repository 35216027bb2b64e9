"""How likely answers are under a student, with the scoring of `elara.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elara import checkpoint, runs
from elara.errors import naming
from elara.evaluation.loss import cut_windows, measure_loss
from elara.evaluation.text import HeldOutText
from elara.tokenizer import TextError


class Student:
    """A checkpoint, run folder or run name; ElaraError when there is none."""

    def __init__(self, where: str, device: torch.device) -> None:
        self.path = runs.find_checkpoint(where)
        self._loaded = checkpoint.load(self.path, device=device)

    def nats_per_byte(self, texts: Sequence[str]) -> list[float | None]:
        """Of each text by itself, behind the end token; None where its tokenizer loses a character."""
        known = [i for i, text in enumerate(texts) if self._keeps(text)]
        found: list[float | None] = [None] * len(texts)
        if known:
            passages = HeldOutText("answers", [texts[i] for i in known], len(known))
            context = self._loaded.config.model.context_length
            windows = cut_windows(passages, self._loaded.tokenizer, context, None, str(self.path))
            with naming(self.path):
                loss, _ = measure_loss(self._loaded.model, windows)
            for i, nats, size in zip(known, loss.nats, loss.sizes, strict=True):
                found[i] = nats / size
        return found

    def _keeps(self, text: str) -> bool:
        try:
            self._loaded.tokenizer.encode_exactly(text)
        except TextError:
            return False
        return True
