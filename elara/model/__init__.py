"""The architecture: tensors only. Knows no Lightning, no Hydra, no files."""

from elara.model.cache import KVCache
from elara.model.lm import ElaraLM, Output
from elara.model.moe import CLEAN, MASK, RoutingStats
from elara.model.section import MaskSection, Supervision, draw_section

__all__ = [
    "CLEAN",
    "MASK",
    "ElaraLM",
    "KVCache",
    "MaskSection",
    "Output",
    "RoutingStats",
    "Supervision",
    "draw_section",
]
