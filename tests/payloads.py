"""Files that run code in whoever reads them carelessly: what runs leaves a marker."""

from __future__ import annotations

import io
import json
import os
import pickle
import tempfile
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


NUMBERS = ("train.bin", "val.bin", "train.ends", "val.ends", "ids", "logprobs", "following")  # nothing of torch's


def program(marker: Path) -> str:
    """A Python file that hurts whoever imports it; `PROGRAM` names its classes."""
    return f"import os\nos.system(\"touch '{marker}'\")\nConfig = Model = Tokenizer = dict\n"


PROGRAM = {  # of transformers' config.json and tokenizer_config.json: classes in a file beside them
    "model_type": "program", "tokenizer_class": "Tokenizer",
    "auto_map": {"AutoConfig": "program.Config", "AutoModelForCausalLM": "program.Model",
                 "AutoTokenizer": ["program.Tokenizer", "program.Tokenizer"]},
}  # fmt: skip


def spoiled(name: str, content: bytes, marker: Path) -> dict[str, bytes]:
    """Ways to put a payload into a file of this name, by what they are: in its place, and among what it says."""
    command = f"touch '{marker}'"
    tag = f"!!python/object/apply:os.system [\"{command}\"]"
    template = "{{ cycler.__init__.__globals__.os.system(" + json.dumps(command) + ") }}"
    suffix, made = Path(name).suffix, {"a pickle": pickled(marker)}
    if suffix in (".json", ".jsonl", ".yaml", ".log"):
        made["YAML tags"] = tag.encode()
        try:
            lines = content.splitlines() if suffix in (".jsonl", ".log") else [content]
            parsed = [yaml.safe_load(line) if suffix == ".yaml" else json.loads(line) for line in lines]
        except ValueError:
            return {**made, "a script": content + SCRIPT.encode()}
        target = {"_target_": "os.system", "command": command}
        reference = "${oc.create:{_target_:os.system,command:\"" + command + "\"}}"
        for what, dicts, words in (
            ("targets", target, ""), ("a script", {SCRIPT: SCRIPT}, SCRIPT + template),
            ("references", {"x": reference}, reference),
        ):  # fmt: skip
            made[what] = "".join(json.dumps(_within(part, dicts, words)) + "\n" for part in parsed).encode()
        if suffix == ".yaml" and isinstance(parsed[0], list):
            callback = f"+callbacks.x={{_target_:torch.load,f:'{marker.with_suffix('.pt')}',weights_only:false}}"
            made["overrides"] = yaml.safe_dump([*parsed[0], callback]).encode()
        if name in ("config.json", "tokenizer_config.json"):
            made["a program"] = json.dumps({**parsed[0], **PROGRAM}).encode()
    elif suffix in (".txt", ".csv", ".md"):
        made["a script"] = content.replace(b"\n", SCRIPT.encode() + b"\n")
    elif suffix == ".jinja":
        made["a template"] = template.encode() + content
    elif suffix == ".gguf":
        made |= {"a template": _gguf(content, template, lists=False), "a script": _gguf(content, SCRIPT, lists=True)}
    elif name not in NUMBERS:
        made["a pickle of torch's"] = saved_by_torch(marker)
    return made


def _gguf(content: bytes, words: str, *, lists: bool) -> bytes:
    """A GGUF file with `words` after every text but what its reader is chosen by, and as its chat template.

    lists: also after every token of its vocabulary.
    """
    import gguf

    with tempfile.TemporaryDirectory() as place:
        old, new = Path(place, "old.gguf"), Path(place, "new.gguf")
        old.write_bytes(content)
        reader = gguf.GGUFReader(old)
        writer = gguf.GGUFWriter(new, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            value, plain = field.contents(), name in ("tokenizer.ggml.model", "tokenizer.ggml.pre")
            if not (plain or (isinstance(value, list) and not lists)):
                value = _within(value, {}, words)
            if not name.startswith("GGUF.") and name not in ("general.architecture", "tokenizer.chat_template"):
                writer.add_key_value(name, value, *field.types[:2])
        writer.add_chat_template(words)

        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data.copy())
        del reader, tensor
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return new.read_bytes()


def _within(value: Any, dicts: dict[str, Any], words: str) -> Any:
    """JSON with `dicts` added to every object and `words` to every text."""
    if isinstance(value, dict):
        return {**{key: _within(part, dicts, words) for key, part in value.items()}, **dicts}
    if isinstance(value, list):
        return [_within(part, dicts, words) for part in value]
    return value + words if isinstance(value, str) else value
