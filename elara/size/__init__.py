"""What a model weighs, counted from its configuration without building it."""

from elara.size.activations import Activations, activation_bytes
from elara.size.files import FORMATS, file_bytes
from elara.size.parameters import PARTS, Part, adamw_bytes, count_parameters, kv_cache_bytes
from elara.size.report import size_report

__all__ = [
    "FORMATS",
    "PARTS",
    "Activations",
    "Part",
    "activation_bytes",
    "adamw_bytes",
    "count_parameters",
    "file_bytes",
    "kv_cache_bytes",
    "size_report",
]
