"""Token files on disk: what their manifest may say of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from elara.data.tokens import TokenFile
from elara.errors import ElaraError

POINTERS = np.dtype("O").itemsize


@pytest.mark.parametrize("dtype", ["O", "<i8", "<f4", ["O"], {"names": ["x"], "formats": ["O"]}, None])
def test_bytes_are_never_taken_for_objects(token_file: Callable[..., TokenFile], dtype: object) -> None:
    """Numpy would follow a file's bytes as places in memory: they are ids, or the file is refused."""
    folder = token_file(POINTERS).folder
    (folder / "train.bin").write_bytes(bytes(range(POINTERS)) * POINTERS)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text("utf-8")), "dtype": dtype}), "utf-8")
    with pytest.raises(ElaraError, match=r"manifest\.json has no dtype of tokens: delete .* and run again") as caught:
        TokenFile(folder, "train")
    assert "\n" not in str(caught.value)
