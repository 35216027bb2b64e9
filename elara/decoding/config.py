"""How to choose tokens: the Hydra schema of everything that `elara.sample` and the training callback sample with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from elara.errors import ElaraError

MODES = ("auto", "ar", "tidar", "diffusion")
ORDERS = ("confidence", "left_to_right")
OVERFLOWS = ("slide", "error")


@dataclass
class SamplingConfig:
    """Sampling choices; checked when made, ElaraError names the bad key."""

    mode: str = "auto"  # ar: a token per forward; tidar: draft and verify several; diffusion: denoise blocks;
    # auto: tidar at the pace that a controller finds fastest, ar for a model without diffusion head
    max_new_tokens: int = 256  # tokens to write after each prompt
    temperature: float = 0.8  # logits are divided by it; 0 = greedy
    top_k: int | None = None  # keep only the k most likely tokens; null (or a k above the vocabulary) = all
    top_p: float | None = None  # keep the smallest set of tokens that holds this probability; null = all
    seed: int = 0  # row r of a batch draws from seed + r, whatever the other rows are
    stop: list[int] = field(default_factory=list)  # token ids that end a row; the stop token is still emitted
    draft_length: int | None = None  # tokens per TiDAR step; null = the controller's choice, else the trained length
    groups: int | None = None  # mask groups per step, behind the likeliest numbers of accepted tokens; null = all
    trust: float = 0.0  # tidar: also accept what is (1 - trust) as likely as the best token; above 0 the text changes
    steps: int | None = None  # diffusion: forwards per block; null = one per token
    confidence: float | None = None  # diffusion: reveal every token at least this probable; null = by steps alone
    order: str = "confidence"  # diffusion: reveal the surest tokens first, or left_to_right
    overflow: str = "slide"  # text beyond the context: slide = a window goes on; error = refuse it beforehand
    exit_threshold: float | None = None  # ar, diffusion: end recursion after a pass that moves every token by less than
    # this share of its norm; the text then depends on the rows beside it; null = all passes

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
                f"draft_length={self.draft_length} must be at least 1 (null = the controller or the trained length)",
            ),
            (-(2**63) <= self.seed < 2**63, f"seed={self.seed} must fit into 64 bits"),
            (self.groups is None or self.groups >= 1, f"groups={self.groups} must be at least 1 (null = all)"),
            (0 <= self.trust <= 1, f"trust={self.trust} must be between 0 (exact) and 1 (accept every draft)"),
            (self.steps is None or self.steps >= 1, f"steps={self.steps} must be at least 1 (null = one per token)"),
            (
                self.confidence is None or 0 < self.confidence <= 1,
                f"confidence={self.confidence} must be in (0, 1] (null = reveal by steps alone)",
            ),
            (self.order in ORDERS, f"order={self.order} must be one of: {', '.join(ORDERS)}"),
            (self.overflow in OVERFLOWS, f"overflow={self.overflow} must be one of: {', '.join(OVERFLOWS)}"),
            (
                self.exit_threshold is None or 0 <= self.exit_threshold < math.inf,
                f"exit_threshold={self.exit_threshold} must be 0 (all passes) or a positive number (null = off)",
            ),
        ]
        for ok, message in rules:
            if not ok:
                raise ElaraError(message)
