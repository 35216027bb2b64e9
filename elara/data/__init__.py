"""Corpora, packed token files, batches whose order is a pure function of seed, epoch and step."""

from elara.data.batches import Batches, Order, ValidationBatches
from elara.data.config import DataConfig
from elara.data.module import ElaraData
from elara.data.preparation import Prepared, open_prepared, prepare
from elara.data.tokens import TokenFile

__all__ = [
    "Batches",
    "DataConfig",
    "ElaraData",
    "Order",
    "Prepared",
    "TokenFile",
    "ValidationBatches",
    "open_prepared",
    "prepare",
]
