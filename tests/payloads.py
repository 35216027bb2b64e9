"""Files that run code in whoever reads them carelessly: what runs leaves a marker."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
import yaml

SCRIPT = "<script>document.title='hurt'</script>\"'><img src=x onerror=hurt()>"


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


def spoiled(name: str, content: bytes, marker: Path) -> dict[str, bytes]:
    """Ways to put a payload into a file of this name, by what they are: in its place, and among what it says."""
    command = f"touch '{marker}'"
    tag = f"!!python/object/apply:os.system [\"{command}\"]"
    template = "{{ cycler.__init__.__globals__.os.system(" + json.dumps(command) + ") }}"
    made = {"a pickle": pickled(marker), "a pickle of torch's": saved_by_torch(marker), "YAML tags": tag.encode()}
    suffix = Path(name).suffix
    if suffix in (".json", ".jsonl", ".yaml", ".log"):
        try:
            parsed = [json.loads(line) for line in content.splitlines()] if suffix in (".jsonl", ".log") else (
                yaml.safe_load(content)
            )  # fmt: skip
        except ValueError:
            return {**made, "a script": content + SCRIPT.encode()}
        target = {"_target_": "os.system", "command": command}
        reference = "${oc.create:{_target_:os.system,command:\"" + command + "\"}}"
        for what, dicts, words in (
            ("targets", target, ""), ("a script", {SCRIPT: SCRIPT}, SCRIPT), ("a template", {}, template),
            ("references", {"x": reference}, reference),
        ):  # fmt: skip
            within = _within(parsed, dicts, words)
            parts = within if suffix in (".jsonl", ".log") else [within]
            made[what] = "".join(json.dumps(part) + "\n" for part in parts).encode()
        if suffix == ".yaml" and isinstance(parsed, list):
            callback = f"+callbacks.x={{_target_:torch.load,f:'{marker.with_suffix('.pt')}',weights_only:false}}"
            made["overrides"] = yaml.safe_dump([*parsed, callback]).encode()
    elif suffix in (".txt", ".csv", ".md"):
        made["a script"] = content.replace(b"\n", SCRIPT.encode() + b"\n")
    return made


def _within(value: Any, dicts: dict[str, Any], words: str) -> Any:
    """JSON with `dicts` added to every object and `words` to every text."""
    if isinstance(value, dict):
        return {**{key: _within(part, dicts, words) for key, part in value.items()}, **dicts}
    if isinstance(value, list):
        return [_within(part, dicts, words) for part in value]
    return value + words if isinstance(value, str) else value
