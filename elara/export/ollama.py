"""A GGUF file's Modelfile for Ollama, and the commands that go with it."""

from __future__ import annotations

import json
from pathlib import Path

from elara.errors import ElaraError
from elara.export.source import Source
from elara.export.vocabulary import Vocabulary
from elara.runs import write_whole

CHAT = "{{- range .Messages }}<|{{ .Role }}|>{{ .Content }}%s{{ end }}<|assistant|>"  # Tokenizer.apply_chat, generate
PLAIN = "{{ .Prompt }}"


def write_modelfile(path: Path, source: Source, tables: Vocabulary, *, temperature: float, num_ctx: int | None) -> None:
    """Write the Modelfile beside the GGUF file `path`. num_ctx: tokens; None = the trained context.

    Raises ElaraError for values that Ollama would not take.
    """
    context = source.config.model.context_length if num_ctx is None else num_ctx
    if temperature < 0 or context < 1:
        raise ElaraError(f"format.temperature={temperature} and format.num_ctx={context} must not be negative")
    end = tables.tokens[tables.end]
    lines = [
        f"FROM ./{path.name}",
        f'TEMPLATE """{CHAT % end if source.chat else PLAIN}"""',
        f"PARAMETER temperature {temperature:g}",
        f"PARAMETER num_ctx {context}",
        f"PARAMETER stop {json.dumps(end)}",
        f'LICENSE """{source.about.license}"""',
    ]
    write_whole(path.with_name("Modelfile"), "\n".join(lines) + "\n")


def commands(path: Path, name: str) -> list[str]:
    """What the user runs next. path: the GGUF file, as it is to be shown."""
    return [f"ollama create {name} -f {path.with_name('Modelfile')}", f"ollama run {name}"]
