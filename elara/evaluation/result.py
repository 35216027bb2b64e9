"""What an evaluation found: plain values that become JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from elara.evaluation.agreement import Agreement
from elara.evaluation.calls import ToolCalls
from elara.evaluation.drafts import Drafts
from elara.evaluation.loss import Loss
from elara.evaluation.speed import Speed


@dataclass
class Result:
    """Figures of one checkpoint. What was not measured is None or empty. parameters: all weights of the model. tasks:
    task -> metric -> value, `<metric>_stderr` beside it, as lm-eval reports them."""

    name: str
    step: int | None
    parameters: int
    loss: Loss | None = None
    drafts: Drafts | None = None
    agreement: list[Agreement] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    tool_calls: ToolCalls | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not one becomes None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
