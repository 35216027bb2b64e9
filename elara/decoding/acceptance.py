"""How far drafts reach: acceptance by position in the draft."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from elara.config import SamplingConfig
from elara.decoding.generation import generate
from elara.model import ElaraLM


@dataclass
class Acceptance:
    """Counts over all rows. offered[i], accepted[i]: drafted tokens at position i + 2 of a draft (the first comes from
    the AR head and always stands). tokens, forwards: written tokens and the forwards that wrote them, per row."""

    offered: list[int]
    accepted: list[int]
    tokens: int
    forwards: int

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(1, self.forwards)

    @property
    def reach(self) -> list[float]:
        """Share of the drafts whose first i + 2 tokens all stood."""
        return [a / o if o else 0.0 for a, o in zip(self.accepted, self.offered, strict=True)]


def measure_acceptance(
    model: ElaraLM,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    mask_id: int,
    *,
    allowed: Tensor | None = None,
    depth: int | None = None,
) -> Acceptance:
    """Continue the prompts by TiDAR, in one batch, and count what happens to the drafts. Raises as `generate` does."""
    drafted = (sampling.draft_length or model.config.tidar.block_length) - 1
    found = Acceptance([0] * drafted, [0] * drafted, 0, 0)
    for step in generate(model, prompts, sampling, mode="tidar", allowed=allowed, mask_id=mask_id, depth=depth):
        for tokens, offered, accepted in zip(step.tokens, step.drafted, step.accepted, strict=True):
            found.tokens += len(tokens)
            found.forwards += bool(tokens)
            for i in range(offered):
                found.offered[i] += 1
                found.accepted[i] += i < accepted
    return found
