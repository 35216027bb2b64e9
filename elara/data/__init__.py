"""Corpora and packed token files; batches are in `elara.data.batches`, the Lightning module in `elara.data.module`."""

from elara.data.config import DataConfig
from elara.data.preparation import Prepared, open_prepared, prepare
from elara.data.tokens import TokenFile

__all__ = ["DataConfig", "Prepared", "TokenFile", "open_prepared", "prepare"]
