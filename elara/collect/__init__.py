"""Asking teachers: prompts from data or files, an append-only store of answers, filters, disagreement."""

from elara.collect.config import CollectConfig
from elara.collect.prompts import Prompt
from elara.collect.store import Store

__all__ = ["CollectConfig", "Prompt", "Store"]
