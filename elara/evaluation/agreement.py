"""What a lower precision of the weights costs: difference in loss and agreement of the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elara.evaluation.loss import Windows, ratio
from elara.evaluation.scoring import Scored


@dataclass
class Agreement:
    """One precision against float32 on the same text. difference: nats per token more than float32, with its standard
    error over passages; same_best: share of the tokens at which both have the same likeliest token."""

    precision: str
    difference: float
    difference_error: float
    same_best: float
    tokens: int


def compare_scores(
    precision: str, windows: Windows, reference: Sequence[Scored], scored: Sequence[Scored]
) -> Agreement:
    """Compare scores of the same windows under two precisions of one model."""
    more, tokens = [0.0] * len(windows.sizes), [0] * len(windows.sizes)
    same = 0
    for passage, before, after in zip(windows.passages, reference, scored, strict=True):
        more[passage] += float((before.log_probs.double() - after.log_probs.double()).sum())
        tokens[passage] += len(after.best)
        same += int((before.best == after.best).sum())
    difference, error = ratio(more, tokens)
    return Agreement(precision, difference, error, same / sum(tokens), sum(tokens))
