"""The architecture: tensors only. Knows no Lightning, no Hydra, no files."""

from elara.model.cache import KVCache
from elara.model.lm import ElaraLM, Output
from elara.model.moe import CLEAN, MASK, RoutingStats, Text
from elara.model.precision import convert
from elara.model.section import MaskSection, Supervision, block_positions, draw_section, draw_starts

__all__ = [
    "CLEAN",
    "MASK",
    "ElaraLM",
    "KVCache",
    "MaskSection",
    "Output",
    "RoutingStats",
    "Supervision",
    "Text",
    "block_positions",
    "convert",
    "draw_section",
    "draw_starts",
]
