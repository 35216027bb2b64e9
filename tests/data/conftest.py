"""Small corpora that the data tests share."""

import numpy as np
import pytest

from elara.data.tokens import TokenFile, TokenWriter
from elara.runs import project_root


@pytest.fixture(scope="session")
def archive_cache():
    """The project's own cache of downloads: fetched once, on the first run."""
    return project_root() / "data" / "archives"


@pytest.fixture
def token_file(tmp_path):
    """Makes a TokenFile of documents with so many tokens; token i of the stream is i."""

    def make(*lengths, dtype="<u2"):
        folder = tmp_path / f"tokens-{'-'.join(map(str, lengths))}"
        folder.mkdir(exist_ok=True)
        with TokenWriter(folder, "train", np.dtype(dtype)) as writer:
            for length in lengths:
                start = writer.counts["tokens"]
                writer.write(np.arange(start, start + length), length)
                writer.end_document()
        manifest = {"dtype": dtype, "train": writer.counts}
        (folder / "manifest.json").write_text(str(manifest).replace("'", '"'))
        return TokenFile(folder, "train")

    return make


@pytest.fixture
def gpt2_path(archive_cache, tmp_path):
    """A folder whose subfolders find GPT-2's vocabulary without a download."""
    from elara.tokenizer.gpt2 import GPT2Tokenizer

    GPT2Tokenizer.fetch(archive_cache)
    for name in ("whole", "pieces1", "pieces7", "pieces100"):
        (tmp_path / "roots" / name).mkdir(parents=True)
        (tmp_path / "roots" / name / "archives").symlink_to(archive_cache)
    return tmp_path / "roots"
