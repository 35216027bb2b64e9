"""Teachers' opinions on disk: what their manifest may say of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from elara.data.opinions import MANIFEST, OpinionFile, OpinionWriter
from elara.errors import ElaraError

POINTERS = np.dtype("O").itemsize


@pytest.mark.parametrize("dtype", ["O", "<i8", ["O"], {"names": ["x"], "formats": ["O"]}, "nonsense", 7])
def test_bytes_are_never_taken_for_objects(tmp_path: Path, dtype: object) -> None:
    """Numpy would follow a file's bytes as places in memory: they are ids, or the file is refused."""
    writer = OpinionWriter(tmp_path, k=2, vocab_size=300)
    writer.write(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 3), torch.zeros(3))
    writer.stop()
    writer.finish({})
    assert len(list(OpinionFile(tmp_path).parts())) == 1

    (tmp_path / "ids").write_bytes(bytes(range(POINTERS)) * 6)
    about = json.loads((tmp_path / MANIFEST).read_text("utf-8"))
    (tmp_path / MANIFEST).write_text(json.dumps({**about, "ids": dtype}), "utf-8")
    with pytest.raises(ElaraError, match=r"what a teacher said in .* cannot be read .*: delete it") as caught:
        OpinionFile(tmp_path)
    assert "\n" not in str(caught.value)
