"""The items of a local task, as lm-eval's `custom_dataset` asks for them: no hub, no cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The JSON lines of `file` in this folder, as the split `test`."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
