"""How to choose tokens: the Hydra schema of everything that `elara.sample` and the training callback sample with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from elara.errors import ElaraError

MODES = ("ar", "tidar")


@dataclass
class SamplingConfig:
    """Sampling choices; checked when made, ElaraError names the bad key."""

    mode: str = "ar"  # ar: one token per forward; tidar: draft and verify several (needs a diffusion head)
    max_new_tokens: int = 256  # tokens to write after each prompt
    temperature: float = 0.8  # logits are divided by it; 0 = greedy
    top_k: int | None = None  # keep only the k most likely tokens; null (or a k above the vocabulary) = all
    top_p: float | None = None  # keep the smallest set of tokens that holds this probability; null = all
    seed: int = 0  # row r of a batch draws from seed + r, whatever the other rows are
    stop: list[int] = field(default_factory=list)  # token ids that end a row; the stop token is still emitted
    draft_length: int | None = None  # tokens per TiDAR draft; null = the block length that the model was trained with

    def __post_init__(self) -> None:
        rules = [
            (self.mode in MODES, f"mode={self.mode} must be one of: {', '.join(MODES)}"),
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"),
            (
                self.temperature >= 0 and math.isfinite(self.temperature),
                f"temperature={self.temperature} must be 0 (greedy) or a positive number",
            ),
            (self.top_k is None or self.top_k >= 1, f"top_k={self.top_k} must be at least 1 (null = all tokens)"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1] (null = all tokens)"),
            (
                self.draft_length is None or self.draft_length >= 1,
                f"draft_length={self.draft_length} must be at least 1 (null = the trained block length)",
            ),
        ]
        for ok, message in rules:
            if not ok:
                raise ElaraError(message)
