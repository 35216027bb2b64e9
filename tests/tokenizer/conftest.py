"""Tokenizers that the tests share."""

import pytest

from elara.runs import project_root
from elara.tokenizer.gpt2 import GPT2Tokenizer


@pytest.fixture(scope="session")
def archive_cache():
    """The project's own cache of downloads: fetched once, on the first run."""
    return project_root() / "data" / "archives"


@pytest.fixture(scope="session")
def gpt2(archive_cache):
    return GPT2Tokenizer.fetch(archive_cache)
