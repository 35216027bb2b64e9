"""Files that run code in whoever reads them carelessly: what runs leaves a marker."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import torch


class Payload:
    """Whoever unpickles it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def saved_by_torch(marker: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"state_dict": Payload(marker)}, out)
    return out.getvalue()
