"""A teacher's configuration: Hydra schema of what an option of the group `teacher` fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TeacherConfig:
    """Another model to learn from, under its own name in `teachers`."""

    weight: float = 1.0  # its share among the teachers
    backend: dict[str, Any] = field(default_factory=dict)  # a Hydra target of elara.backends
