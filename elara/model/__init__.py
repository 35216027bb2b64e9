"""The architecture: tensors only. Knows no Lightning, no Hydra, no files."""

from elara.model.cache import KVCache
from elara.model.lm import ElaraLM, Output
from elara.model.moe import CLEAN, MASK, RoutingStats
from elara.model.precision import PRECISIONS, convert
from elara.model.section import MaskSection, Supervision, draw_section

__all__ = [
    "CLEAN",
    "MASK",
    "PRECISIONS",
    "ElaraLM",
    "KVCache",
    "MaskSection",
    "Output",
    "RoutingStats",
    "Supervision",
    "convert",
    "draw_section",
]
