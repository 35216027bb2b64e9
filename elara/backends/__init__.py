"""Other models behind one protocol: as teachers, as queens of the hive, as embedders."""

from elara.backends.base import (
    Answer,
    Backend,
    BackendError,
    Capabilities,
    Messages,
    Params,
    TokenChoice,
    TopLogprobs,
)
from elara.backends.config import TeacherConfig

__all__ = [
    "Answer",
    "Backend",
    "BackendError",
    "Capabilities",
    "Messages",
    "Params",
    "TeacherConfig",
    "TokenChoice",
    "TopLogprobs",
]
